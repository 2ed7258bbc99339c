"""Index rows and probe scores against numpy on the same K and Q."""

import gguf
import numpy as np
import pytest
from conftest import config, prompt_op, random_tokens, replay, step_ops
from test_pages import EXT, HEADER, POSITION, take

import zoomr_local.libllama as libllama
from zoomr_local.errors import EngineError
from zoomr_local.libllama.library import llama

RELATIVE = 1e-5  # both sides sum 64 products in f32; measured 3e-7


def keys_of(context, page: np.ndarray, type_k: str) -> np.ndarray:
    """float32 [n_paged_layers, tokens, n_head_kv, head_dim], read from a page's bytes without our library."""
    n = page[24:28].view(np.uint32)[0]
    width = context.n_head_kv * context.head_dim
    k_bytes = n * (width * 2 if type_k == "f16" else width // 32 * 34)
    v_bytes = context.token_bytes * n // context.n_paged_layers - k_bytes
    offset, out = HEADER + n * (POSITION + EXT), []
    for _ in range(context.n_paged_layers):
        raw = page[offset:offset + k_bytes]
        if type_k == "f16":
            rows = raw.view(np.float16).astype(np.float32)
        else:
            rows = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
        out.append(rows.reshape(n, context.n_head_kv, context.head_dim))
        offset += k_bytes + v_bytes
    return np.stack(out)


def reference(q: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """q [layer, head, d] x rows [row, layer, head_kv, d] -> [layer, head, row], in double precision."""
    group = q.shape[1] // rows.shape[2]
    spread = np.repeat(rows.astype(np.float64), group, axis=2)
    return np.einsum("lhd,rlhd->lhr", q.astype(np.float64), spread)


def assert_close(ours: np.ndarray, theirs: np.ndarray, relative: float = RELATIVE) -> None:
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs)) <= relative * np.max(np.abs(theirs))


@pytest.fixture(params=["one", "three-unified", "three-streams"])
def context(request, kv, models):
    n_seq, unified = (1, False) if request.param == "one" else (3, request.param == "three-unified")
    args = config(kv, n_seq_max=n_seq, kv_unified=unified)
    with libllama.LlamaContext(models("llama"), tap_query=True, key_probe=40, index_rows=256, **args) as context:
        for seq in range(n_seq):
            replay(context, [prompt_op(50, seed=seq, seq=seq)])
        yield context


def test_index_rows_are_means_of_the_resident_keys(context, kv):
    type_k = config(kv)["type_k"]
    last = context.n_seq_max - 1
    keys = keys_of(context, take(context, 0, 50, seq=last, free=False), type_k)
    assert context.index_mean(3, last, 10, 30) == 20
    assert_close(context.index_get(3), keys[:, 10:30].mean(axis=1, dtype=np.float64), 1e-6)
    context.index_key(200, last, 41)
    np.testing.assert_array_equal(context.index_get(200), keys[:, 41])
    context.page_free(last, 12, 30)
    assert context.index_mean(4, last, 10, 30) == 2, "keys that left the cache do not count"
    assert_close(context.index_get(4), keys[:, 10:12].mean(axis=1, dtype=np.float64), 1e-6)


def test_index_scores_equal_numpy(context):
    """Rows that grow past the padding, in every sequence of one batch, after the keys have left the cache."""
    n_seq = context.n_seq_max
    for row in range(100):
        context.index_mean(row, row % n_seq, row % 40, row % 40 + 1 + row % 7)
    for seq in range(n_seq):
        context.page_free(seq, 0, 45)
    rows = np.stack([context.index_get(row) for row in range(100)])
    for step, n_rows in enumerate((5, 64, 65, 100)):
        context.n_rows = n_rows
        context.decode_batch(random_tokens(n_seq, step), [50 + step] * n_seq, list(range(n_seq)), [True] * n_seq)
        assert context.scores().shape == (context.n_paged_layers, n_seq, context.n_head, n_rows)
        for seq in range(n_seq):
            q = context.query()[:, seq]
            assert np.abs(q).max() > 0
            assert_close(context.scores()[:, seq], reference(q, rows[:n_rows]))


def test_key_scores_equal_numpy_and_single_key_rows(context, kv):
    type_k = config(kv)["type_k"]
    n_seq = context.n_seq_max
    positions = [0, 49, 7, 7, 23] + list(range(10, 45))
    keys = [keys_of(context, take(context, 0, 50, seq=seq, free=False), type_k) for seq in range(n_seq)]
    for seq in range(n_seq):
        context.set_key_probe(seq, positions)
    for row, pos in enumerate(positions):
        context.index_key(row, n_seq - 1, pos)
    context.n_rows = len(positions)
    context.decode_batch(random_tokens(n_seq, 9), [50] * n_seq, list(range(n_seq)), [True] * n_seq)
    for seq in range(n_seq):
        q = context.query()[:, seq]
        assert_close(context.key_scores()[:, seq], reference(q, keys[seq][:, positions].transpose(1, 0, 2, 3)))
    assert_close(context.key_scores()[:, n_seq - 1], context.scores()[:, n_seq - 1])


def test_a_prompt_in_several_pieces_scores_its_last_token(kv, models):
    """n_ubatch 32: the last piece's last token counts, and equals that token decoded alone."""
    tokens = random_tokens(100)
    got = []
    for pieces in ([100], [99, 1]):
        with libllama.LlamaContext(models("llama"), n_ubatch=32, tap_query=True, **config(kv)) as context:
            replay(context, [prompt_op(30, seed=7)])
            context.index_mean(0, 0, 0, 30)
            context.n_rows = 1
            done = 0
            for n in pieces:
                context.decode(tokens[done:done + n], list(range(30 + done, 30 + done + n)))
                done += n
            got.append((context.query().copy(), context.scores().copy()))
    # a prompt and a single token go through different kernels; f16 attention differs in its last bits
    assert_close(got[0][0], got[1][0], 2e-2)
    assert_close(got[0][1], got[1][1], 2e-2)


def test_the_tapped_query_is_the_models_own(models, paths):
    """Layer 0, in numpy from the file's weights: norm, projection, rotation by the logical position."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(paths["llama"]).tensors}
    with libllama.LlamaContext(models("llama"), tap_query=True, **config("f16-fa")) as context:
        replay(context, [prompt_op(50)])
        context.page_free(0, 10, 40)
        token, position = 77, 50
        context.decode([token], [position])
        tapped = context.query()[0, 0]
    x = tensors["token_embd.weight"][token].astype(np.float64)
    x = x / np.sqrt(np.mean(x**2) + 1e-6) * tensors["blk.0.attn_norm.weight"]
    q = (tensors["blk.0.attn_q.weight"] @ x).reshape(tapped.shape)
    angle = position * 10000.0 ** (-np.arange(0, q.shape[1], 2) / q.shape[1])
    rotated = np.empty_like(q)
    rotated[:, 0::2] = q[:, 0::2] * np.cos(angle) - q[:, 1::2] * np.sin(angle)
    rotated[:, 1::2] = q[:, 0::2] * np.sin(angle) + q[:, 1::2] * np.cos(angle)
    assert_close(tapped, rotated, 1e-5)


def test_a_sequence_that_is_not_decoded_keeps_its_scores(models):
    with libllama.LlamaContext(models("llama"), **config("f16-fa", n_seq_max=2)) as context:
        replay(context, [prompt_op(20, seq=0), prompt_op(20, seed=1, seq=1)])
        context.index_mean(0, 0, 0, 10)
        context.n_rows = 1
        assert not context.scores().any(), "nothing was decoded since there are rows"
        replay(context, step_ops(20, 1, seq=0))
        first = context.scores().copy()
        assert first[:, 0].any() and not first[:, 1].any()
        replay(context, step_ops(20, 1, seq=1))
        second = context.scores()
        np.testing.assert_array_equal(second[:, 0], first[:, 0])
        assert second[:, 1].any()


def test_unwritten_rows_score_zero_and_cleared_rows_are_gone(models):
    with libllama.LlamaContext(models("llama"), index_rows=2048, **config("f16-fa")) as context:
        replay(context, [prompt_op(20)])
        context.index_mean(130, 0, 0, 10)
        context.n_rows = 140
        replay(context, step_ops(20, 1))
        written = np.flatnonzero(context.scores().any(axis=(0, 1, 2)))
        assert written.tolist() == [130]
        context.index_clear()
        assert context.n_rows == 0 and context.scores().shape[-1] == 0
        context.n_rows = 140
        assert not context.index_get(130).any()


def test_rows_survive_a_save_and_a_load(models):
    with libllama.LlamaContext(models("llama"), **config("q8-fa")) as context:
        replay(context, [prompt_op(20)])
        context.index_mean(0, 0, 0, 10)
        saved = context.index_get(0)
        context.n_rows = 2
        context.index_set(1, saved)
        replay(context, step_ops(20, 1))
        np.testing.assert_array_equal(context.scores()[..., 0], context.scores()[..., 1])


def test_the_graph_is_rebuilt_only_when_the_padded_rows_grow(models):
    with libllama.LlamaContext(models("llama"), key_probe=4, tap_query=True, **config("f16-fa")) as context:
        replay(context, [prompt_op(20)])
        reused = lambda: llama.llama_perf_context(context._ctx).n_reused  # noqa: E731
        replay(context, step_ops(20, 1))
        before = reused()
        for i in range(64):
            context.index_mean(i, 0, 0, 10)
            context.n_rows = i + 1
            context.set_key_probe(0, [i % 20])
            replay(context, step_ops(21 + i, 1))
        assert reused() - before == 63, "one rebuild: from no rows to 64"
        context.n_rows = 65
        replay(context, step_ops(85, 1))
        assert reused() - before == 63
        replay(context, step_ops(86, 1))
        assert reused() - before == 64


def test_wrong_rows_and_probes_are_errors(models):
    with libllama.LlamaContext(models("llama"), index_rows=64, key_probe=2, **config("f16-fa")) as context:
        replay(context, [prompt_op(20)])
        with pytest.raises(EngineError, match="index row 64 of 64"):
            context.index_mean(64, 0, 0, 10)
        with pytest.raises(EngineError, match="index row 99 of 64"):
            context.n_rows = 100
        with pytest.raises(EngineError, match=r"no resident key of sequence 0 in \[50, 60\)"):
            context.index_mean(0, 0, 50, 60)
        with pytest.raises(EngineError, match="position 30 is not resident"):
            context.set_key_probe(0, [30])
        with pytest.raises(EngineError, match="made for 2"):
            context.set_key_probe(0, [1, 2, 3])
        with pytest.raises(EngineError, match="shape"):
            context.index_set(0, np.zeros(3, dtype=np.float32))
        context.set_key_probe(0, [1, 2])
        context.page_free(0, 2, 5)
        replay(context, step_ops(20, 1))
        with pytest.raises(EngineError, match="1 probed positions were not resident"):
            context.key_scores()
        with pytest.raises(EngineError, match="tap_query"):
            context.query()
    with libllama.LlamaContext(models("llama"), paging=False, **config("f16-fa")) as context:
        for call in (context.scores, context.index_clear, lambda: context.page_free(0, 0, 1)):
            with pytest.raises(EngineError, match="paging=False"):
                call()


def test_kq_scale_and_layers_are_the_models(models):
    with libllama.LlamaContext(models("gemma3"), **config("f16-fa")) as context:
        assert context.layer_ids == [1, 3], "the full-attention layers"
        assert context.n_paged_layers == 2
    with libllama.LlamaContext(models("llama"), **config("f16-fa")) as context:
        assert context.layer_ids == [0, 1, 2]
        assert all(context.kq_scale(i) == pytest.approx(1 / np.sqrt(64)) for i in range(3))
