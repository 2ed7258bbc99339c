"""What happened, as values: the one stream that every consumer reads.

The engine yields these; the command line, a trace file, a report or a server draw them. Nothing here
decides anything, and nothing is compacted, paged, zoomed, split or truncated without one of these.
Anybody may import this file; it imports nothing of ours.

Sizes are tokens or bytes and say so in the name. A position is the index of a token in the logical
sequence (prompt first), never a cell.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with the event's name under ``event``."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class PromptProgress(Event):
    """``done_tokens`` of ``total_tokens`` of the prompt have been prefilled."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class TokenDecoded(Event):
    """One token was sampled. ``text`` may be empty (a marker, half a character, the beginning of a stop string).

    ``role`` is the segment it belongs to: thought, summary, answer or marker. ``resident_tokens`` is the
    number of cells in use when it was sampled.
    """

    position: int
    token: int
    text: str
    role: str
    resident_tokens: int


@dataclass(frozen=True)
class TokenInjected(Event):
    """A token that the runtime writes in the model's place, to open or close a summary (mode ``prompted``).

    It stands in the text and in the cache as a decoded one does, and is not counted among the tokens of the reply.
    The fields are those of `TokenDecoded`.
    """

    position: int
    token: int
    text: str
    role: str
    resident_tokens: int


@dataclass(frozen=True)
class SummaryCut(Event):
    """A prompted summary reached its longest, ``summary_tokens`` of the model's, with the token at ``position``; the runtime
    closes it."""

    position: int
    summary_tokens: int


@dataclass(frozen=True)
class BlockClosed(Event):
    """A block is complete and may be paged from now on.

    ``detail`` and ``summary`` are half-open position ranges; ``summary`` is ``None`` for a block that is
    indexed by its own keys (a piece of a prompt or of a thought). ``label`` is the summary's text, without what the
    runtime wrote in it, or the first words of the detail.
    """

    block: int
    kind: str
    detail: tuple[int, int]
    summary: tuple[int, int] | None
    label: str


@dataclass(frozen=True)
class Split(Event):
    """Something was longer than its share of the budget and was cut into pieces; no text was lost."""

    what: str
    position: int
    piece_tokens: int
    limit_tokens: int


@dataclass(frozen=True)
class Refreshed(Event):
    """A new selection was taken. ``agreement`` is the share of votes that fall on ``zoomed``, None without votes."""

    position: int
    zoomed: tuple[int, ...]
    agreement: float | None
    reason: str


@dataclass(frozen=True)
class Voted(Event):
    """The votes by which a selection was taken, one number a block, in their order; only where `Engine.tell_votes` asks.

    It comes before `Refreshed`, and also where the selection changes nothing, which `Refreshed` does not say.
    """

    position: int
    votes: tuple[float, ...]
    reason: str


@dataclass(frozen=True)
class PagedOut(Event):
    """Blocks left the cache. ``written_bytes`` counts first page-outs only: a stored block is never rewritten."""

    position: int
    blocks: tuple[int, ...]
    part: str
    tokens: int
    written_bytes: int


@dataclass(frozen=True)
class PagedIn(Event):
    """Blocks came back into the cache, whole."""

    position: int
    blocks: tuple[int, ...]
    part: str
    tokens: int
    read_bytes: int


@dataclass(frozen=True)
class ReadAhead(Event):
    """Blocks that were chosen are on disk; their pages are being read. They come in with the next selection that
    still wants them, or with this one where the disk is waited for."""

    position: int
    blocks: tuple[int, ...]
    part: str
    bytes: int


@dataclass(frozen=True)
class BlockLost(Event):
    """The stored ``part`` of blocks is gone for good: without a detail a block goes on as its summary, without a
    summary as its index rows. What is in cells now stays until it leaves. ``path`` is the file, if one failed."""

    position: int
    blocks: tuple[int, ...]
    part: str
    reason: str
    path: str | None


@dataclass(frozen=True)
class Dropped(Event):
    """Tokens left the cache for good, because the policy says so."""

    position: int
    tokens: int


@dataclass(frozen=True)
class HeadsEvicted(Event):
    """A selection of a per-head policy: tokens left the cells, in each layer and KV head other ones; for good, but under
    `clusterkv`, where they wait in a tier (`HeadsRecalled`).

    ``layers`` were full and had ``freed_cells`` cells of single heads freed, a number each; ``held_tokens`` are those that
    every head of every layer holds now. ``budget_tokens``, where a policy moves them, are what each head of those layers may
    keep at a selection; a head that was given more only now holds less until tokens have come.
    """

    position: int
    layers: tuple[int, ...]
    freed_cells: tuple[int, ...]
    held_tokens: tuple[tuple[int, ...], ...]
    budget_tokens: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class HeadsRecalled(Event):
    """The same selection brought tokens back into cells, after those of `HeadsEvicted` had left.

    ``layers`` had ``recalled_cells`` cells of single heads filled, a number each; ``held_tokens`` are what every head of every
    layer holds now, after both. ``hit_rate`` is the share of the selected
    clusters that one of the last R selections had too, the mean over KV heads and layers; None for the first R.
    """

    position: int
    layers: tuple[int, ...]
    recalled_cells: tuple[int, ...]
    held_tokens: tuple[tuple[int, ...], ...]
    hit_rate: float | None


@dataclass(frozen=True)
class BeaconDecoded(Event):
    """A beacon was decoded at ``position`` and stands for the ``window_tokens`` before it, which `Dropped` then counts.

    It is no part of the reply: neither text nor one of its tokens.
    """

    position: int
    window_tokens: int


@dataclass(frozen=True)
class ThinkingCut(Event):
    """Thinking was ended after ``thinking_tokens`` and the model handed over to its answer by a closing sentence.

    ``reason``: ``budget``, ``loop`` (it repeated itself), ``asked`` (by the user), or ``ended``: the model ended its
    reply without an answer.
    """

    position: int
    reason: str
    thinking_tokens: int


@dataclass(frozen=True)
class PrefilledAgain(Event):
    """A conversation is read again from its first token instead of going on from what is in the cache, and why."""

    tokens: int
    reason: str


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know about the result or its cost."""

    message: str


@dataclass(frozen=True)
class CacheStats:
    """Counters of one generation.

    ``budget_tokens`` is the limit on cells in use; ``allocated_tokens`` is what llama.cpp made of it, which is
    the budget rounded up to 256. ``token_bytes`` is what one cell costs. ``page_outs`` and ``page_ins`` count
    thoughts (details) that left and came back. ``agreement`` is the mean over refreshes. ``ram_bytes`` and
    ``disk_bytes`` are the most that pages took in each tier; ``disk_written_bytes`` and ``disk_read_bytes`` are page
    files written and read, headers included. ``lost_blocks`` can never come back whole; ``faults`` are page files
    that could not be written or read. ``beacons`` were decoded, each in place of the tokens before it (which ``dropped_tokens``
    counts), and ``dropped_beacons`` of them were dropped for want of room. ``summaries`` is the mode by which thoughts became
    blocks, None under policies without blocks. The runtime opened ``prompted_summaries`` and wrote ``injected_tokens`` to open and
    close them, ``cut_summaries`` of them at their longest. ``layer_cells`` are the cells that each KV head of a layer has, in
    the mean over its heads, a number a layer, under per-head policies; there a cell in use is one in every layer and head.
    ``cluster_hit_rate`` is the mean of `HeadsRecalled`'s over layers and selections, None but under `clusterkv`, and
    ``recalled_tokens`` are the cells of single heads that came back, divided by how many layers and heads there are.
    """

    policy: str
    budget_tokens: int
    allocated_tokens: int
    token_bytes: int
    resident_peak_tokens: int
    resident_mean_tokens: float
    blocks: int
    paged_out_bytes: int
    page_outs: int
    page_ins: int
    refreshes: int
    agreement: float | None
    dropped_tokens: int
    splits: int
    ram_bytes: int = 0
    disk_bytes: int = 0
    disk_written_bytes: int = 0
    disk_read_bytes: int = 0
    lost_blocks: int = 0
    faults: int = 0
    beacons: int = 0
    dropped_beacons: int = 0
    summaries: str | None = None
    injected_tokens: int = 0
    prompted_summaries: int = 0
    cut_summaries: int = 0
    layer_cells: tuple[int, ...] | None = None
    cluster_hit_rate: float | None = None
    recalled_tokens: int = 0


@dataclass(frozen=True)
class Finished(Event):
    """The generation ended. ``reason``: ``stop``, ``length`` (max tokens), ``kv_full`` (the tiers are full, and that
    was to end it) or ``cancelled``. ``thinking_cut``: why thinking was ended before the model did, as in ThinkingCut.
    After several turns ``prompt_tokens`` is everything before this reply, and ``cache`` counts from the first turn on."""

    reason: str
    content: str
    reasoning: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache: CacheStats
    thinking_cut: str | None = None


def event_from_dict(data: dict[str, Any]) -> Event:
    """The event that ``as_dict`` described, also after a way through JSON. Raises ValueError for an unknown one."""
    known = {kind.__name__: kind for kind in Event.__subclasses__()}
    name, fields = data["event"], {k: _tuples(v) for k, v in data.items() if k != "event"}
    if name not in known:
        raise ValueError(f"there is no event {name!r}")
    if "cache" in fields:
        fields["cache"] = CacheStats(**fields["cache"])
    return known[name](**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
