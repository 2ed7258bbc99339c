"""Save, load, continue: the same events to the last one, for every policy, wherever the generation was cut. What is refused: test_session_refusals.py."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from sessions import BUDGET, GREEDY, MAX_TOKENS, WARM, Cuts, config, has, play, resumed, role, tokens, told

from zoomr_local import session
from zoomr_local.engine import Engine
from zoomr_local.errors import UsageError
from zoomr_local.events import BlockLost, Finished, PagedIn, PagedOut, PromptProgress, ReadAhead, TokenDecoded
from zoomr_local.libllama import LlamaContext, LlamaSampler
from zoomr_local.policies import POLICIES
from zoomr_models import bundled_model_path

HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

COMMON = {
    "first-event": lambda engine, events: True,
    "in-the-prompt": lambda engine, events: isinstance(events[-1], PromptProgress) and not has(TokenDecoded, events),
    "right-after-prefill": lambda engine, events: tokens(events) == 1,
    "half-way": lambda engine, events: tokens(events) == MAX_TOKENS // 2,
    "last-token": lambda engine, events: tokens(events) == MAX_TOKENS,
}
BLOCKS = {
    "before-any-page-out": lambda engine, events: has(TokenDecoded, events) and not has(PagedOut, events),
    "in-mid-step": lambda engine, events: isinstance(events[-1], PagedOut),
    "out-and-not-yet-back": lambda engine, events: has(PagedOut, events) and not has(PagedIn, events) and role(events),
    "in-a-summary": lambda engine, events: role(events) == "summary" and has(PagedOut, events),
}


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.unit not in ("beacon", "head")])
def test_a_loaded_session_gives_the_events_that_were_left(model, prompt, tmp_path, policy, sampling):
    conditions = {**COMMON, **(BLOCKS if POLICIES[policy].unit == "block" else {})}
    plain = play(model, prompt, config(policy), sampling)
    cuts = Cuts(tmp_path, **conditions)
    assert play(model, prompt, config(policy), sampling, look=cuts) == plain, "saving changes nothing"
    assert policy != "zoomr" or has(PagedIn, plain)
    # a long prompt is paged before the first token, so of these one or two cannot be met
    assert set(cuts.left) <= {"before-any-page-out", "out-and-not-yet-back"}
    for name, at in cuts.at.items():
        assert resumed(model, config(policy), tmp_path / name) == plain[at:], name


def test_a_short_prompt_is_cut_before_and_between_the_first_pages(model, prompt, tmp_path):
    short = prompt[: len(prompt) // 2]
    cuts = Cuts(tmp_path, **{name: BLOCKS[name] for name in ("before-any-page-out", "out-and-not-yet-back", "in-a-summary")})
    plain = play(model, short, config(kv_budget=256), WARM, 400, cuts)
    assert not cuts.left and has(PagedIn, plain)
    for name, at in cuts.at.items():
        assert resumed(model, config(kv_budget=256), tmp_path / name) == plain[at:], name


@pytest.mark.parametrize("more", [
    {"kv_type": "q8_0"}, {"flash_attn": False}, {"kv_page_type": "q8_0"}, {"kv_ram": 1 << 16, "kv_disk": 1 << 30},
    {"kv_ram": 1 << 18, "kv_disk": 0}, {"kv_ram": 1 << 18, "kv_disk": 0, "on_full": "stop"},
], ids=str)  # fmt: skip
def test_every_form_of_cells_and_pages_continues(model, prompt, tmp_path, more):
    """With little RAM pages are on disk and are read ahead; with none of it either, blocks are lost or the text ends."""
    more = {**more, "kv_dir": tmp_path / "pages"}
    cuts = Cuts(
        tmp_path, half=lambda engine, events: tokens(events) == 30, ahead=lambda engine, events: isinstance(events[-1], ReadAhead),
        buffered=lambda engine, events: any(p.buffered for p in engine.store.placements()),
        lost=lambda engine, events: isinstance(events[-1], BlockLost), full=lambda engine, events: engine._running.cache.full,
    )  # fmt: skip
    plain = play(model, prompt, config(**more), WARM, look=cuts)
    if more.get("kv_disk"):
        assert plain[-1].cache.disk_bytes and {"ahead", "buffered"} <= set(cuts.at) and has(PagedIn, plain)
    elif "on_full" in more:
        assert plain[-1].reason == "kv_full" and "full" in cuts.at
    elif "kv_disk" in more:
        assert "lost" in cuts.at and plain[-1].cache.lost_blocks
    else:
        assert has(PagedIn, plain)
    for name, at in cuts.at.items():
        assert resumed(model, config(**more), tmp_path / name) == (plain[at:] or plain[-1:]), f"{name}; one that ended says again how"


@pytest.mark.parametrize("links", [True, False])
def test_pages_on_disk_are_linked_where_that_is_possible_and_copied_where_not(model, prompt, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EXDEV, "Invalid cross-device link")))
    more = {"kv_ram": 1 << 16, "kv_dir": tmp_path / "pages"}
    engine = Engine(model, config(**more))
    events, stream = [], engine.generate(prompt, WARM, MAX_TOKENS)
    for event in stream:
        events.append(event)
        if tokens(events) == MAX_TOKENS // 2:
            break
    reads = engine.store.read_bytes
    saved = engine.save(tmp_path / "s")
    assert engine.store.read_bytes == reads, "reading pages for a save is not counted"
    linked = [path for path in (tmp_path / "s").glob("page-*.bin") if path.stat().st_nlink == 2]
    assert bool(linked) is links and len(list((tmp_path / "s").glob("page-*.bin"))) == len(linked)
    assert (saved.total_bytes - saved.written_bytes > 40_000) is links
    rest = [told(event) for event in stream]
    engine.close()
    assert not any((tmp_path / "pages").iterdir()), "the tier's own files are gone"
    assert resumed(model, config(**more), tmp_path / "s") == rest


@pytest.mark.parametrize("policy", ["zoomr", "full", "random"])
def test_a_fresh_process_continues_it(model, prompt, tmp_path, policy):
    cuts = Cuts(tmp_path, half=COMMON["half-way"])
    plain = play(model, prompt, config(policy), WARM, look=cuts)
    asked = {"directory": str(tmp_path / "half"), "model": str(bundled_model_path()),
             "config": {"policy": policy, "kv_budget": BUDGET, "threads": 1}}  # fmt: skip
    done = subprocess.run([sys.executable, str(HERE / "session_worker.py"), json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rest = [json.loads(line) for line in done.stdout.splitlines()]
    rest[-1] |= {"prefill_seconds": 0, "decode_seconds": 0}
    assert rest == [json.loads(json.dumps(event.as_dict())) for event in plain[cuts.at["half"] :]]


def test_a_session_of_a_session_of_a_session(model, prompt, tmp_path):
    """Each engine makes twenty tokens and saves; pages of all of them end up in one directory."""
    plain = play(model, prompt, config(), WARM)
    events, sizes = [], []
    for turn in range(20):
        engine = Engine(model, config())
        if turn:
            engine.load(tmp_path / "s")
        stream = engine.resume() if turn else engine.generate(prompt, WARM, MAX_TOKENS)
        for event in stream:
            events.append(told(event))
            if isinstance(event, TokenDecoded) and tokens(events) % 20 == 0:
                break
        sizes.append(engine.save(tmp_path / "s"))
        engine.close()
        if has(Finished, events):
            break
    assert events == plain and len(sizes) > 6
    pages = [size.total_bytes - size.written_bytes for size in sizes]
    assert pages[-1] > 200_000 and (kib := [size // 1024 for size in pages[-4:]]) == sorted(kib), "a page is written once"
    assert sizes[-1].total_bytes <= sum(f.stat().st_size for f in (tmp_path / "s").iterdir())


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_k": 8, "top_p": 0.9999, "min_p": 0.0001, "repeat_penalty": 1.4}], ids=str)
def test_random_numbers_that_are_skipped_are_those_that_were_drawn(model, prompt, filters):
    """llama.cpp's generator cannot be saved: what replays it must leave it exactly where drawing did, however few the candidates."""
    with LlamaContext(model.llama, n_cells=256, n_threads=1, paging=False) as context:
        cut = max(i for i, token in enumerate(prompt[:50]) if model.llama.piece(token) == b" is") + 1  # at this temperature any token may follow
        context.decode(prompt[:cut], range(cut))

        def sampler() -> LlamaSampler:
            return LlamaSampler(model.llama, temperature=20.0, seed=7, repeat_last_n=16, **filters)

        one = sampler()
        drawn = [one.sample(context) for _ in range(120)]
        assert len(set(drawn)) > 1 or filters == {"top_k": 1}
        for n in (0, 1, 63, 119):
            other = sampler()
            for token in drawn[:n][-16:]:
                other.accept(token)
            other.skip(n)
            assert other.draws == n and [other.sample(context) for _ in range(120 - n)] == drawn[n:]


def test_an_ended_generation_can_be_saved_and_ends_again(model, prompt, tmp_path):
    engine = Engine(model, config())
    plain = [told(event) for event in engine.generate(prompt, WARM, 30)]
    engine.save(tmp_path / "s")
    engine.close()
    assert resumed(model, config(), tmp_path / "s") == plain[-1:]


@pytest.mark.parametrize("policy", ["zoomr", "full"])
def test_a_cancelled_generation_ends_again_too(model, prompt, tmp_path, policy):
    engine = Engine(model, config(policy))
    events = []
    for event in engine.generate(prompt, WARM, 60):
        events.append(told(event))
        if tokens(events) == 20:
            engine.cancel()
    assert events[-1].reason == "cancelled"
    engine.save(tmp_path / "s")
    engine.close()
    assert resumed(model, config(policy), tmp_path / "s") == events[-1:]


def test_text_note_and_counts_can_be_read_off_a_session(model, prompt, tmp_path):
    engine = Engine(model, config())
    seen = ""
    for event in engine.generate(prompt, WARM, 60):
        seen += event.text if isinstance(event, TokenDecoded) and event.role != "marker" else ""
        if isinstance(event, TokenDecoded) and event.position == len(prompt) + 40:
            break
    engine.save(tmp_path / "s", {"who": "me"})
    session = engine.load(tmp_path / "s")
    assert session.note == {"who": "me"} and session.completion_tokens == 41
    with pytest.raises(UsageError, match="must be JSON"):
        engine.save(tmp_path / "s", {"who": object()})
    without_markers = (session.reasoning + session.content).replace("<|begin_of_summary|>", "").replace("<|end_of_summary|>", "")
    assert without_markers == seen
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir()} == {0o600}
    engine.close()


def test_seconds_go_on_and_saving_is_not_decoding(model, prompt, tmp_path, monkeypatch):
    """On a clock of our own an event takes a second and a save a thousand."""
    now, split = [0.0], session.split

    def slow_split(state, *path):
        now[0] += 1000 * (not path)
        return split(state, *path)

    monkeypatch.setattr(session, "split", slow_split)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    engine = Engine(model, config())
    count, stream = 0, engine.generate(prompt, WARM, 80)
    while True:
        event = next(stream)
        if isinstance(event, Finished):
            break
        count, now[0] = count + 1, now[0] + 1
        if count % 20 == 0:
            engine.save(tmp_path / "s")
        if count == 60:
            now[0] += 5000  # nobody is there
            engine.load(tmp_path / "s")
            stream = engine.resume()
    assert count > 60 and event.prefill_seconds > 3 and event.decode_seconds > 30
    assert event.prefill_seconds + event.decode_seconds == count
    engine.close()


def test_a_longer_request_before_does_not_change_what_full_computes(model, prompt, tmp_path):
    cuts = Cuts(tmp_path, half=COMMON["half-way"])
    plain = play(model, prompt, config("full"), WARM, look=cuts)
    engine = Engine(model, config("full"))
    list(engine.generate(prompt * 3, GREEDY, 300))
    engine.load(tmp_path / "half")
    assert [told(event) for event in engine.resume()] == plain[cuts.at["half"] :]
    assert [told(event) for event in engine.generate(prompt, WARM, MAX_TOKENS)] == plain, "and it still generates"
    engine.close()
