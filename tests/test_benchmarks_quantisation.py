"""`benchmarks.quantisation`: what it counts, by definition, and the command on the bundled models."""

import json

import numpy as np
import pytest

from benchmarks import quantisation
from zoomr_local.libllama import LlamaContext
from zoomr_models import bundled_model_path


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_a_comparison_counts_by_the_definitions():
    rng = np.random.default_rng(0)
    exact, other = log_softmax(rng.normal(size=(50, 7))), log_softmax(rng.normal(size=(50, 7)))
    told = rng.integers(0, 7, 50).tolist()
    found = quantisation.compare(exact, other, told)
    by_hand = [sum(np.exp(p[i]) * (p[i] - q[i]) for i in range(7)) for p, q in zip(exact, other)]
    assert found["nats"] == pytest.approx(sum(by_hand)) and found["most_nats"] == pytest.approx(max(by_hand))
    assert found["wrong"] == [sum(max(range(7), key=lambda i: row[i]) != t for row, t in zip(rows, told)) for rows in (exact, other)]
    assert found["changed"] == sum(np.argmax(a) != np.argmax(b) for a, b in zip(exact, other)) > 0 and found["tokens"] == 50
    same = quantisation.compare(exact, exact, told)
    assert same["changed"] == 0 and same["nats"] == 0


def test_scores_are_of_every_token_with_all_before_it_in_view(model, prompt):
    """A batch's end is no seam: the scores are those of decoding token by token."""
    ids = prompt[: quantisation._BATCH_TOKENS // 2] * 3
    with LlamaContext(model.llama, n_cells=1024, n_batch=quantisation._BATCH_TOKENS, n_threads=1) as context:
        found = quantisation.scores(context, ids)
        assert found.shape == (len(ids) - 1, model.llama.n_vocab)
        context.clear()
        for at, token in enumerate(ids[:-1]):
            context.decode([token], [at])
            if at % 50 == 5 or at > len(ids) - 4:
                np.testing.assert_allclose(found[at], log_softmax(context.logits().astype(float)), atol=0.5)  # kernels of batches and of single tokens round differently; other text is several nats off


def test_cards_have_the_results():
    held = sorted(quantisation.RESULTS.glob("quantisation-*.json"))
    assert held
    for path in held:
        card = quantisation.ROOT / "models" / f"{path.stem.removeprefix('quantisation-')}.md"
        assert quantisation.report(json.loads(path.read_text())["families"]) in card.read_text(encoding="utf-8"), path.name


def test_the_command_compares_a_file_with_itself_and_refuses_what_is_no_pair(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantisation, "LONG_THOUGHTS", {"series": 4, "dag": 3})
    path = str(bundled_model_path())
    card = tmp_path / "zoomr-tiny.md"
    card.write_text(f"above\n{quantisation.BEGIN}\nold\n{quantisation.END}\nbelow\n")
    assert quantisation.main([path, path, "-n", "2", "--results", str(tmp_path), "--cards", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "quantisation-zoomr-tiny.json").read_text())["families"]
    assert set(rows) == {"series", "dag"} and all(r["changed"] == r["nats"] == 0 and r["wrong"][0] == r["wrong"][1] < 3 for r in rows.values())
    assert "`series`" in out and "of 2 |" in out
    text = card.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text and quantisation.report(rows) in text
    assert quantisation.main([path, path, "-n", "0"]) == 2 and "-n 0" in capsys.readouterr().err
    other = tmp_path / "plain-other.gguf"
    other.write_bytes(b"GGUF")
    assert quantisation.main([path, str(other), "-n", "1"]) == 1 and "Traceback" not in capsys.readouterr().err
