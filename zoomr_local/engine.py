"""The decode loop: prompt tokens in, events out.

`solve.py` and the command line drive this file; it drives `kv_cache`, `policies`, `dialects` and `sampling` and
decides nothing that a policy could decide. One step is DESIGN.md section 4: decode, vote, close what ended,
take a new selection if one is due, sample.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generator, Iterator, Sequence

from . import session
from .beacon_generation import BeaconGeneration, check_beacons
from .cluster_generation import ClusterGeneration
from .dialects import Summaries, choose
from .engine_config import EngineConfig as EngineConfig
from .engine_config import resolve_settings as resolve_settings
from .errors import EngineError, ModelError, UnsupportedModel, UsageError
from .events import Event, Warned
from .generation import Generation, pinned_ranges
from .heads_cache import HeadCells
from .heads_generation import HeadGeneration
from .heads_setup import head_cells, head_policy, layer_tokens
from .journal import model_fingerprint
from .libllama import LlamaContext
from .model import Model
from .plan import PAGE_OVERHEAD_BYTES, context_arguments, paged_cells
from .policies import POLICIES, Policy
from .policies.heads import HeadPolicy
from .sampling import SamplingParams
from .session import Saved, Session
from .thinking import ThinkingLimits
from .tiers import PackedPages, PageStore, RawPages, TierLimits
from .turns import BlockTurns, FullTurns, TokenTurns, Turns


class Engine:
    """One model under one policy. Cells are allocated once, here (for ``full``: at the longest request so far)."""

    def __init__(self, model: Model, config: EngineConfig = EngineConfig()) -> None:
        """Raises UnsupportedModel, with the reason, if the model's cache cannot be paged exactly; ModelError for
        metadata with impossible settings; BudgetError or UsageError for a choice that fits neither, or for a policy or a way
        to summarise that needs another model, or for one that needs a calibration that is not there."""
        self.model, self.config = model, config
        self.policy = self._new_policy()
        self.summaries = self._summaries()
        limits = TierLimits(config.kv_ram, config.kv_disk, config.kv_dir)
        self.store = PageStore(limits if self.policy.unit == "block" else TierLimits(config.kv_ram, 0) if self._recalls else TierLimits(0, 0))
        self.context: LlamaContext | None = None
        self._heads: HeadCells | None = None
        self._running: Generation | None = None
        self._stream: Generator[Event, None, None] | None = None
        self._reserved_tokens = 0
        self._closed = False
        self.tell_votes = False
        """Whether generations that begin, or are loaded, from now on say the votes of each selection; it changes nothing else."""
        if self.policy.unit != "all":
            pinned_ranges(config.kv_budget, config.kv_budget, self.policy)  # whether sinks leave room, said early
            if self.policy.unit == "head":
                self._share_out_cells(0, 0)
            else:
                self.context = self._new_context(self.config.kv_budget)
                self._check_layers()

    def _new_policy(self) -> Policy | HeadPolicy:
        config, model = self.config, self.model
        if POLICIES[config.policy].unit == "head":
            return head_policy(model, config)
        try:
            settings = resolve_settings(config, model.settings)
        except ValueError as error:
            raise ModelError(f"the metadata of {model.path} sets what cannot be: {error}") from None
        if POLICIES[config.policy].unit == "beacon":
            settings = replace(settings, beacon_every=check_beacons(model, config.beacon_every, config.kv_budget))
        return POLICIES[config.policy](settings)

    def _summaries(self) -> Summaries:
        """How thoughts become blocks; under a policy without blocks markers are read all the same."""
        c, model = self.config, self.model
        if self.policy.unit != "block":
            return Summaries()
        tokenize = partial(model.llama.tokenize, add_special=False, parse_special=False)
        return choose(c.summaries, model.markers, tokenize, c.thought_min, c.summary_max, model.name)

    def generate(
        self, prompt: Sequence[int], sampling: SamplingParams, max_tokens: int, *, limits: ThinkingLimits | None = None,
        room_tokens: int = 0, keep_thinking: bool = False,
    ) -> Iterator[Event]:
        """The events of one prompt from an empty cache; the last is `Finished`. Nothing runs until they are asked for.

        ``limits`` say when thinking is ended. With ``room_tokens`` this is the first turn of a conversation, which can
        be extended to so many tokens in all; ``keep_thinking``: thinking of earlier turns can still be zoomed then.
        A generation that is still running on this engine ends. Raises UsageError for an empty prompt, a token id
        outside the vocabulary or ``max_tokens`` below 1, and EngineError once the engine is closed.
        """
        prompt = list(prompt)
        self._check(prompt, max_tokens)
        if self.policy.unit == "head":
            self._share_out_cells(len(prompt), len(prompt) + max_tokens)
        self._running = self._new_generation(max(len(prompt) + max_tokens, room_tokens))
        self._converse(room_tokens, limits, keep_thinking)
        self._stream = self._running.run(prompt, sampling, max_tokens, tuple(self._cautions()))
        return self._stream

    def extend(
        self, tokens: Sequence[int], sampling: SamplingParams, max_tokens: int, *, limits: ThinkingLimits | None = None,
        keep_tokens: int | None = None,
    ) -> Iterator[Event]:
        """The events of one more turn of a conversation: ``tokens`` follow what was prefilled and written so far.

        ``keep_tokens``: follow the first so many of it only, under policy ``full``. Raises as ``generate`` does, and
        EngineError if nothing was generated with ``room_tokens``, if the room does not suffice, or if the last turn
        was not read to its end.
        """
        tokens, running = list(tokens), self._running
        self._check(tokens, max_tokens)
        if self.room_tokens == 0:
            raise EngineError("there is no conversation to go on with; begin one with generate(..., room_tokens=N)")
        kept = len(self.sequence) if keep_tokens is None else keep_tokens
        if kept + len(tokens) + max_tokens > self.room_tokens:
            raise EngineError(f"{kept} + {len(tokens)} + {max_tokens} tokens do not fit the room of {self.room_tokens}")
        if self._stream is not None:
            self._stream.close()
        self._converse(self.room_tokens, limits, running.keep_thinking)
        self._stream = running.extend(tokens, sampling, max_tokens, keep_tokens)
        return self._stream

    def _check(self, prompt: list[int], max_tokens: int) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if not prompt:
            raise UsageError("the prompt is empty: nothing to decode")
        if min(prompt) < 0 or max(prompt) >= self.model.llama.n_vocab:
            raise UsageError(f"the prompt has a token id outside 0..{self.model.llama.n_vocab - 1}")
        if max_tokens < 1:
            raise UsageError(f"--max-tokens {max_tokens}: must be at least 1")

    def _converse(self, room_tokens: int, limits: ThinkingLimits | None, keep_thinking: bool) -> None:
        running = self._running
        if isinstance(running, Turns):
            running.room_tokens, running.limits, running.keep_thinking = room_tokens, limits, keep_thinking
        elif room_tokens or limits is not None:
            raise UsageError(f"--policy {self.config.policy} has no conversations and no --think-budget; choose another policy")

    @property
    def sequence(self) -> Sequence[int]:
        """The tokens that were decoded so far, by position: prompts and replies. Not to be changed."""
        return () if self._running is None else self._running.timeline.tokens

    @property
    def room_tokens(self) -> int:
        """How long the conversation can become; 0 if there is none, or none that could be extended."""
        running = self._running
        return running.room_tokens if isinstance(running, Turns) and running.reply is not None and running.prompt_is_read else 0

    @property
    def generation(self) -> Generation | None:
        """The running or ended generation, for whoever draws it; only `conversation.py` may change it, between two turns."""
        return self._running

    def answer_now(self) -> None:
        """Ask the running generation to end its thinking after the current token and to answer."""
        if isinstance(self._running, Turns):
            self._running.answer_now = True

    def save(self, directory: str | Path, note: dict[str, Any] | None = None) -> Saved:
        """Save the running or ended generation to ``directory`` (made, mode 0700), in place of a session there.

        To be called between two events; what is saved is the state after the last whole step, with the events of it
        that were not delivered yet. Nothing of the generation changes, and the time is not counted as its own.
        ``note`` (JSON) is the caller's. Raises SessionError if the directory is not a session's, in use or full (an
        older session in it is whole then), EngineError if no generation has begun or it broke in the middle of a
        step, UnsupportedModel for a model whose memory is more than a KV cache.
        """
        self._refuse_sessions()
        if self._closed or self._running is None:
            raise EngineError("the engine is closed" if self._closed else "nothing was generated yet, so there is nothing to save")
        with self._running.paused():
            try:
                return session.save(Path(directory), self._running, self._made_with, self._reserved_tokens, note or {})
            except UnsupportedModel as error:
                llama = self.model.llama
                raise UnsupportedModel(f"{llama.path.name} ({llama.desc}) cannot be saved as a session. {error}") from None

    def load(self, directory: str | Path) -> Session:
        """Take up the session in ``directory``; `resume` then gives its remaining events.

        A generation that is still running on this engine ends. Raises SessionError if there is no session, if it is
        damaged, or if it was made with another model, cache, policy or version: then the message names each of them.
        """
        self._refuse_sessions()
        if self._closed:
            raise EngineError("the engine is closed")
        self.forget()
        found = session.load(Path(directory), self._made_with)
        try:
            running = self._new_generation(found.needed_tokens, found.reserved_tokens)
            session.restore(found, running)
        except BaseException:
            self.forget()
            raise
        self._running = running
        return found

    def forget(self) -> None:
        """Let go of the generation, whether it runs or has ended: its cells, index rows and pages, those on disk too.

        What a session holds of it stays there. Cells that are free are not overwritten until they are used again.
        """
        if self._stream is not None:
            self._stream.close()
        self._running = self._stream = None
        if self._closed:
            return
        self.store.clear()
        if self.context is not None:
            self.context.clear()
            if self.policy.unit == "block" and self.policy.uses_votes:
                self.context.index_clear()

    def _refuse_sessions(self) -> None:
        if self.policy.unit == "head":
            raise UsageError(f"--policy {self.config.policy} cannot be saved in a session or a checkpoint yet; choose another policy")

    def resume(self) -> Iterator[Event]:
        """The remaining events of a session that was just loaded. Raises EngineError if none was."""
        if self._running is None or self._stream is not None:
            raise EngineError("no session was loaded; call load first")
        self._stream = self._running.resume()
        return self._stream

    @cached_property
    def _made_with(self) -> dict[str, Any]:
        c, everything = self.config, self.policy.unit == "all"
        cache = {
            "policy": c.policy, "kv budget": None if everything else c.kv_budget, "kv type": c.kv_type,
            "flash attention": c.flash_attn, "kv page type": c.kv_page_type, "batch": c.batch,
            "markers": [asdict(row) for row in self.model.marker_sets],
        }  # fmt: skip
        return session.made_with(self.model, self.resolved(), cache, None if everything else self.context.n_cells)

    def _new_generation(self, n_tokens: int, cells: int | None = None) -> Generation:
        """A generation of at most ``n_tokens``, prompt included; ``full`` gets ``cells`` if they are given."""
        if self._stream is not None:
            self._stream.close()
        try:
            if self.policy.unit == "all":
                self._reserve(n_tokens, cells)
            self._begin_store(n_tokens)
        except BaseException:
            self.forget()  # cells and pages may be gone already, so nobody may go on with what was in them
            raise
        kinds = {
            "all": FullTurns, "block": BlockTurns, "token": TokenTurns, "beacon": BeaconGeneration,
            "head": partial(ClusterGeneration if self._recalls else HeadGeneration, self._heads),
        }  # fmt: skip
        kind = kinds[self.policy.unit]
        running = kind(self.model, self.context, self.store, self.policy, self.budget_tokens, self.config.on_full, self.summaries)
        running.tell_votes = self.tell_votes
        return running

    def _cautions(self) -> Iterator[Event]:
        budget, cells = self.config.kv_budget, self._paged_cells()
        if self.policy.unit != "all" and cells > budget:
            yield Warned(
                f"{self.model.name} also has layers with a sliding window of {self.model.llama.n_swa} tokens, so"
                f" {cells} cells are allocated; --kv-budget {budget} still bounds those in use for full attention"
            )
        if self.policy.unit == "block" and self.config.kv_page_type != "f16":
            yield Warned(f"--kv-page-type {self.config.kv_page_type} is lossy: thoughts come back with rounded keys and values")
        if self.policy.unit == "block" and not self.config.kv_ram and not self.config.kv_disk:
            yield Warned("--kv-ram 0 and --kv-disk 0: what leaves the cache cannot come back; its summaries stay")

    @property
    def budget_tokens(self) -> int:
        """Cells that may be in use: ``kv_budget``, or for ``full`` what was reserved."""
        return self._reserved_tokens if self.policy.unit == "all" else self.config.kv_budget

    def cancel(self) -> None:
        """Ask the running generation to end after its current token or piece of the prompt ("cancelled")."""
        if self._running is not None:
            self._running.cancelled = True

    def resolved(self) -> dict[str, Any]:
        """The settings in force, by name; what a record should carry to be repeatable."""
        found = {field.name: getattr(self.policy.settings, field.name) for field in fields(self.policy.settings)}
        if self.policy.unit == "head" and self.policy.calibrated:
            found["layer_demand_tokens"] = list(self.policy.calibration.demand)
        return {**found, **self.summaries.as_dict()} if self.policy.unit == "block" else found

    def close(self) -> None:
        """Free the cells. Safe to call twice."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()
        self.store.close()  # before the context: a page may just be being converted
        self._free_context()

    def _begin_store(self, n_tokens: int) -> None:
        """Empty the tiers and size them for a generation of ``n_tokens``, prompt included. Raises TierSizeError."""
        if self.policy.unit != "block":
            return
        page_type = self.config.kv_page_type
        codec = RawPages() if page_type == "f16" else PackedPages(self.context, page_type)
        n_tokens = self.summaries.longest(n_tokens)
        most = codec.stored_bytes(self.context.page_size(n_tokens), n_tokens)
        self.store.begin(codec, self._fingerprint, most + PAGE_OVERHEAD_BYTES * n_tokens)

    @cached_property
    def _fingerprint(self) -> bytes:
        """16 bytes that say which model and which form of cache a page belongs to."""
        try:
            file = model_fingerprint(self.model.path)
        except OSError:  # moved since it was loaded: what the loaded model says of itself is left
            file = {}
        known = [file, self.model.name, self.model.arch, self.model.size_bytes, self.context.geometry]
        return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).digest()

    def _free_context(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self.context is not None:
            self.context.close()
            self.context = self._heads = None

    @property
    def _recalls(self) -> bool:
        """Whether what leaves single heads' cells may come back."""
        return self.policy.unit == "head" and self.policy.recalls

    def _share_out_cells(self, prompt_tokens: int, length_tokens: int) -> None:
        """Cells as the policy gives them to layers for a text of so many tokens, the prompt's among them: allocated again if
        that is not as before."""
        tokens = layer_tokens(self.policy, self.model.llama.n_layer, self.config.kv_budget, prompt_tokens, length_tokens)
        if self._heads is None or (self._heads.layer_tokens != tokens).any():
            self._free_context()
            self.context = self._new_context(self.config.kv_budget)
            try:
                self._heads = head_cells(self.context, self.policy, tokens)
            except Exception:
                self._free_context()
                raise

    def _reserve(self, n_tokens: int, cells: int | None) -> None:
        if n_tokens > self._reserved_tokens or cells not in (None, self._reserved_tokens):
            self._free_context()
            self._reserved_tokens = 0  # until there are cells again
            self.context = self._new_context(cells or n_tokens)
            self._reserved_tokens = cells or n_tokens

    def _paged_cells(self) -> int:
        return paged_cells(self.config.kv_budget, self.model.llama.n_swa, self.config.batch)

    def _check_layers(self) -> None:
        unknown = set(self.policy.settings.vote_layers) - set(self.context.layer_ids)
        if unknown and self.policy.uses_votes:
            have = f"{min(self.context.layer_ids)} to {max(self.context.layer_ids)}"
            self.close()
            raise UsageError(f"--vote-layers {','.join(map(str, sorted(unknown)))}: {self.model.name} pages layers {have}")

    def _new_context(self, n_tokens: int) -> LlamaContext:
        c = self.config
        arguments = context_arguments(
            n_tokens, paging=self.policy.unit not in ("all", "head"), uses_votes=self.policy.uses_votes, n_swa=self.model.llama.n_swa,
            batch=c.batch, kv_type=c.kv_type, flash_attn=c.flash_attn,
        )  # fmt: skip
        return LlamaContext(self.model.llama, n_threads=c.threads, **arguments)
