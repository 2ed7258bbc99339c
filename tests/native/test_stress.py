"""A long seeded run of random page operations: logical length 30 times the cells, and no drift.

The oracle hides instead of paging: a second context with a cell for every logical token, in which a hidden
range belongs to another sequence (llama_memory_seq_cp and seq_rm; no code of ours). It computes the same
function with the same K and V, summed in another order.
"""

import numpy as np
import pytest
from conftest import config, random_tokens, rel_rms

import zoomr_local.libllama as libllama

N_CELLS = 256
N_LOGICAL = 30 * N_CELLS
SEGMENT = 12      # tokens; as many segments as RESIDENT / 12 are in cells
PIECE = 8         # of which so many are decoded as one batch, like a prompt, the others one by one
RESIDENT = 180    # tokens kept in cells: below N_CELLS, so that the next segment always fits
HIDDEN = 1        # the oracle's sequence for what is paged out

# (mean, worst) relative rms of the logits. A difference enters only through summation order: f32 sums without flash
# attention; with q8_0 a cell's key of a later token may also round to the other neighbour, and that cell stays in use.
NOISE = {"f16-nofa": (5e-4, 5e-3), "q8-fa": (2e-3, 5e-2)}


class Pair:
    """Our paged context and the hiding oracle, driven by the same operations."""

    def __init__(self, model, kv: str, seed: int):
        self.ours = libllama.LlamaContext(model, **config(kv, n_cells=N_CELLS))
        self.oracle = libllama.LlamaContext(model, paging=False, **config(
            kv, n_cells=N_LOGICAL + 256, n_seq_max=2, kv_unified=True))
        self.rng = np.random.default_rng(seed)
        self.pages: dict[int, np.ndarray] = {}  # segment -> its page
        self.out: list[int] = []
        self.resident: list[int] = []
        self.n_ops = 0

    def page_out(self, segment: int) -> None:
        p0, p1 = segment * SEGMENT, (segment + 1) * SEGMENT
        if segment not in self.pages:
            page = np.empty(self.ours.page_bytes(0, p0, p1), dtype=np.uint8)
            self.ours.page_write(0, p0, p1, page)
            self.pages[segment] = page
        assert self.ours.page_free(0, p0, p1) == SEGMENT
        self.oracle.seq_cp(0, HIDDEN, p0, p1)
        self.oracle.seq_rm(0, p0, p1)
        self.resident.remove(segment)
        self.out.append(segment)
        self.n_ops += 1

    def page_in(self, segment: int) -> None:
        p0, p1 = segment * SEGMENT, (segment + 1) * SEGMENT
        assert self.ours.page_in(0, self.pages[segment]) == SEGMENT
        self.oracle.seq_cp(HIDDEN, 0, p0, p1)
        self.oracle.seq_rm(HIDDEN, p0, p1)
        self.out.remove(segment)
        self.resident.append(segment)
        self.n_ops += 1

    def decode(self, tokens: list[int], position: int) -> float:
        for context in (self.ours, self.oracle):
            context.decode(tokens, range(position, position + len(tokens)))
        return rel_rms(self.ours.logits(), self.oracle.logits())

    def segment(self, index: int, tokens: list[int]) -> list[float]:
        """Decodes a segment; the cells are shuffled after its first token, as the newest one has to stay."""
        start = index * SEGMENT
        errors = [self.decode(tokens[:1], start)]
        if len(self.resident) > 1:
            self.shuffle()
        errors.append(self.decode(tokens[1:PIECE], start + 1))
        errors += [self.decode([tokens[i]], start + i) for i in range(PIECE, SEGMENT)]
        self.resident.append(index)
        return errors

    def shuffle(self) -> None:
        """Random segments leave until the next one fits, then random ones come back while there is room."""
        pick = lambda items: items[self.rng.integers(len(items))]  # noqa: E731
        while len(self.resident) * SEGMENT > RESIDENT - SEGMENT:
            self.page_out(pick(self.resident))
        for _ in range(min(self.rng.integers(0, 5), len(self.resident))):
            self.page_out(pick(self.resident))
        while self.out and (len(self.resident) + 1) * SEGMENT <= RESIDENT:
            self.page_in(pick(self.out))

    def close(self) -> None:
        self.ours.close()
        self.oracle.close()


@pytest.mark.parametrize("name", ["f16-nofa", "q8-fa"])
def test_thousands_of_page_operations_leave_no_drift(name, models):
    pair = Pair(models("llama"), name, seed=4)
    errors = []
    tokens = random_tokens(N_LOGICAL, seed=5)
    for index in range(N_LOGICAL // SEGMENT):
        errors += pair.segment(index, tokens[index * SEGMENT:(index + 1) * SEGMENT])
        assert pair.ours.n_used() <= RESIDENT + SEGMENT
    visible = sorted(pair.ours.resident().tolist())
    assert visible == sorted(pair.oracle.resident(0).tolist())
    assert pair.n_ops > 2000 and len(pair.pages) > 500
    pair.close()
    errors = np.array(errors)
    mean, worst = NOISE[name]
    third = len(errors) // 3
    first, last = errors[:third].mean(), errors[-third:].mean()
    print(f"{name}: {pair.n_ops} page operations, rel rms mean {errors.mean():.2e} worst {errors.max():.2e}, "
          f"first third {first:.2e} last third {last:.2e}")
    assert errors.mean() < mean and errors.max() < worst
    assert last < 2 * first + mean / 10, "the difference must not grow with the length"
