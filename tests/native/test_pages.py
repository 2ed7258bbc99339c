"""Pages come back byte for byte, and bytes that are not a page are refused without harm."""

import numpy as np
import pytest
from conftest import config, prompt_op, rel_rms, replay, step_ops

import zoomr_local.libllama as libllama
from zoomr_local.errors import EngineError

# Tokens that come back into other cells are summed in another order. With f32 sums that shows in the last bits
# (q8_0 and flash attention off); llama.cpp's flash attention on the CPU accumulates f16 values in f16.
OTHER_CELLS = {"f16-fa": 1e-2, "q8-fa": 1e-3, "f16-nofa": 1e-4, "q8-nofa": 1e-4}

HEADER, POSITION, EXT = 64, 4, 12  # bytes; native/zoomr-page.cpp


def take(context, p0: int, p1: int, seq: int = 0, free: bool = True) -> np.ndarray:
    page = np.zeros(context.page_bytes(seq, p0, p1), dtype=np.uint8)
    assert context.page_write(seq, p0, p1, page) == page.nbytes
    if free:
        context.page_free(seq, p0, p1)
    return page


@pytest.fixture
def context(kv, models):
    with libllama.LlamaContext(models("llama"), **config(kv)) as context:
        replay(context, [prompt_op(120)])
        yield context


def test_a_page_holds_its_positions_and_costs_what_token_bytes_says(context):
    page = take(context, 10, 60, free=False)
    assert page.nbytes == HEADER + 50 * (POSITION + EXT + context.token_bytes)
    assert page[HEADER:HEADER + 200].view(np.int32).tolist() == list(range(10, 60))
    assert context.page_bytes(0, 500, 600) == HEADER


def test_writing_changes_nothing_and_freeing_only_cells(context):
    before = context.resident().tolist()
    take(context, 10, 60, free=False)
    assert context.resident().tolist() == before
    assert context.page_free(0, 10, 60) == 50
    assert context.resident().tolist() == before[:10] + before[60:]
    assert context.page_free(0, 10, 60) == 0


def test_round_trip_is_byte_for_byte(context):
    page = take(context, 10, 60)
    other = take(context, 90, 100)
    assert context.page_in(0, other) == 10  # into other cells than it came from
    assert context.page_in(0, page) == 50
    np.testing.assert_array_equal(take(context, 10, 60, free=False), page)
    np.testing.assert_array_equal(take(context, 90, 100, free=False), other)


def test_into_the_same_cells_logits_are_bit_identical(kv, models, paths, stock):
    with libllama.LlamaContext(models("llama"), **config(kv)) as context:
        replay(context, [prompt_op(120)])
        page = take(context, 10, 60)
        context.page_in(0, page)
        ours = replay(context, step_ops(120, 8))
    theirs = stock.run(paths["llama"], config(kv), [prompt_op(120), *step_ops(120, 8)])
    np.testing.assert_array_equal(ours, theirs[1:])


def test_a_sliding_window_cache_is_left_alone(kv, models, paths, stock):
    """A page that comes back restores full attention; the window's own keys and values must not have left meanwhile."""
    with libllama.LlamaContext(models("gemma3"), **config(kv)) as context:
        replay(context, [prompt_op(60)])
        page = take(context, 20, 50)  # all of it within the window of 64
        assert context.resident().tolist() == [*range(20), *range(50, 60)]
        context.page_in(0, page)
        ours = replay(context, step_ops(60, 4))
    theirs = stock.run(paths["gemma3"], config(kv), [prompt_op(60), *step_ops(60, 4)])
    np.testing.assert_array_equal(ours, theirs[1:])


def test_into_other_cells_logits_differ_by_summation_order_only(kv, models, paths, stock):
    with libllama.LlamaContext(models("llama"), **config(kv)) as context:
        replay(context, [prompt_op(120)])
        first, second = take(context, 10, 40), take(context, 60, 100)
        gone = replay(context, step_ops(120, 1))
        context.page_in(0, second)
        context.page_in(0, first)
        ours = replay(context, step_ops(121, 8))
        without = rel_rms(gone, stock.run(paths["llama"], config(kv), [prompt_op(120), *step_ops(120, 1)])[1:])
    theirs = stock.run(paths["llama"], config(kv), [prompt_op(120), ["rm", 0, 10, 40], ["rm", 0, 60, 100],
                                                    *step_ops(120, 1)])
    np.testing.assert_array_equal(gone, theirs[1:])
    # the token at 120 was computed without the pages, so the reference is a run in which they come back in order
    with libllama.LlamaContext(models("llama"), **config(kv)) as context:
        replay(context, [prompt_op(120)])
        first, second = take(context, 10, 40), take(context, 60, 100)
        replay(context, step_ops(120, 1))
        context.page_in(0, first)
        context.page_in(0, second)
        reference = replay(context, step_ops(121, 8))
    assert rel_rms(ours, reference) < OTHER_CELLS[kv]
    assert without > 10 * OTHER_CELLS[kv], "the pages must matter for the comparison to say anything"


def test_pages_fill_the_lowest_free_cells_and_never_exceed_them(context):
    replay(context, [prompt_op(130, seed=9, start=120)])
    page = take(context, 0, 30)
    replay(context, step_ops(250, 10))
    free = context.n_cells - context.n_used()
    assert free == 26
    with pytest.raises(EngineError, match="does not fit: 26 of 256 cells are free"):
        context.page_in(0, page)
    assert context.n_used() == 230 and context.resident()[0] == 30, "all or nothing"


def test_sequences_have_pages_of_their_own(kv, models):
    for unified in (False, True):
        with libllama.LlamaContext(models("llama"), **config(kv, n_seq_max=2, kv_unified=unified)) as context:
            replay(context, [prompt_op(40, seq=0), prompt_op(40, seed=1, seq=1)])
            page = take(context, 5, 25, seq=1)
            assert len(context.resident(0)) == 40 and len(context.resident(1)) == 20
            context.page_in(1, page)
            np.testing.assert_array_equal(take(context, 5, 25, seq=1, free=False), page)


def test_a_shared_cell_stays_for_the_other_sequence(models):
    with libllama.LlamaContext(models("llama"), **config("f16-fa", n_seq_max=2, kv_unified=True)) as context:
        replay(context, [prompt_op(40)])
        context.seq_cp(0, 1)
        page = take(context, 5, 25, seq=0)
        assert context.n_used() == 40 and len(context.resident(1)) == 40
        context.page_in(0, page)
        assert context.n_used() == 60, "it comes back as a private copy"
        np.testing.assert_array_equal(take(context, 5, 25, seq=1, free=False), page)


def test_a_copied_stream_has_its_rows_before_it_is_paged(models):
    """llama.cpp moves the rows of a sequence copied between streams at the next decode; a page must not miss them."""
    with libllama.LlamaContext(models("llama"), **config("f16-fa", n_seq_max=2)) as context:
        replay(context, [prompt_op(40)])
        context.seq_cp(0, 1)
        np.testing.assert_array_equal(take(context, 5, 25, seq=1), take(context, 5, 25, seq=0))


def hostile(page: np.ndarray):
    """Pages that were truncated, forged or belong elsewhere, by name."""
    def patched(offset: int, dtype, value):
        out = page.copy()
        out[offset:offset + np.dtype(dtype).itemsize] = np.array([value], dtype=dtype).view(np.uint8)
        return out

    yield "empty", page[:0]
    yield "a part of a header", page[:40]
    yield "a header only", page[:HEADER]
    yield "truncated", page[:-1]
    yield "with bytes to spare", np.append(page, np.zeros(1, dtype=np.uint8))
    yield "wrong magic", patched(0, np.uint32, 0)
    yield "another version", patched(4, np.uint32, 99)
    yield "another geometry", patched(8, np.uint64, 1)
    yield "another size", patched(16, np.uint64, 2**63)
    yield "too many tokens", patched(24, np.uint32, 2**32 - 1)
    yield "too few tokens", patched(24, np.uint32, 1)
    yield "a negative position", patched(HEADER, np.int32, -5)
    yield "positions that go back", patched(HEADER, np.int32, 100)
    yield "a doubled position", patched(HEADER, np.int32, 11)
    yield "a position beyond any context", patched(HEADER + 4 * 49, np.int32, 2**31 - 1)
    yield "a token outside of the vocabulary", patched(HEADER + 4 * 50 + 8, np.int32, 10**6)


def test_hostile_pages_are_refused_and_change_nothing(context):
    page = take(context, 10, 60)
    before = context.resident().tolist()
    for name, bad in hostile(page):
        with pytest.raises(EngineError, match="not a page of this cache"):
            context.page_in(0, bad)
        assert context.resident().tolist() == before, name
    assert context.page_in(0, page) == 50


def test_random_bytes_never_crash(context):
    page = take(context, 10, 60)
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = page.copy()
        at = rng.integers(0, HEADER + 50 * (POSITION + EXT), 8)
        bad[at] = rng.integers(0, 256, 8, dtype=np.uint8)
        try:
            context.page_in(0, bad[:rng.integers(0, page.nbytes + 1)] if rng.random() < 0.5 else bad)
        except EngineError:
            continue
        context.seq_rm(0, 10, -1)
        replay(context, [prompt_op(30, start=10)])


def test_a_resident_position_cannot_come_back_twice(context):
    page = take(context, 10, 60, free=False)
    with pytest.raises(EngineError, match="position 10 is resident already"):
        context.page_in(0, page)
    context.page_free(0, 10, 59)
    with pytest.raises(EngineError, match="position 59 is resident already"):
        context.page_in(0, page)


def test_pages_of_another_cache_are_refused(models):
    pages = {}
    for name in ("f16-fa", "q8-fa", "f16-nofa"):
        with libllama.LlamaContext(models("llama"), **config(name)) as context:
            replay(context, [prompt_op(40)])
            pages[name] = take(context, 0, 20)
            for other, page in pages.items():
                if other != name:
                    with pytest.raises(EngineError, match="another model, KV type or flash attention"):
                        context.page_in(0, page)
    with libllama.LlamaContext(models("qwen2"), **config("f16-fa")) as context:
        with pytest.raises(EngineError, match="another model"):
            context.page_in(0, pages["f16-fa"])


def test_wrong_buffers_and_sequences_are_errors(context):
    with pytest.raises(EngineError, match="needs .* bytes, the buffer has 10"):
        context.page_write(0, 0, 20, np.zeros(10, dtype=np.uint8))
    with pytest.raises(EngineError, match="uint8"):
        context.page_write(0, 0, 20, np.zeros(10**6, dtype=np.float32))
    for call in (context.page_free, context.page_tokens, context.page_bytes):
        for seq in (-1, 1, 10**6):
            with pytest.raises(EngineError, match="sequence"):
                call(seq, 0, 20)
    with pytest.raises(EngineError, match="sequence 7"):
        context.resident(7)


def test_shifted_positions_cannot_be_paged(context):
    """Not reachable through our own interface; a caller of the bindings must not get stale pages either."""
    from zoomr_local.libllama.library import llama
    llama.llama_memory_seq_add(context._memory, 0, 60, -1, 5)
    with pytest.raises(EngineError, match="shifted"):
        context.page_write(0, 0, 20, np.zeros(10**6, dtype=np.uint8))
    with pytest.raises(EngineError, match="shifted"):
        context.page_free(0, 0, 20)
