"""`zoomr chat`: talk with a model for as long as you like inside a KV cache of fixed size.

Reads flags, opens the model, and hands over to `chat_loop.py`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoomr_local.errors import SessionError, UsageError

from . import notes, options, tracing

if TYPE_CHECKING:
    from zoomr_local.events import Finished

    from .chat_loop import ChatLoop

DEFAULT_BUDGET = "2048"
_CHAT = "Chat"


def _option(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_CHAT, **more)


Question = Annotated[
    str | None,
    typer.Argument(metavar="[QUESTION]", help="One question to answer, in place of one on stdin, which is not read then; without either, a chat.", show_default=False),
]
System = Annotated[str | None, _option("-s", "--system", metavar="TEXT", help="The system message.")]
Continue = Annotated[bool, _option("-c", "--continue", help="Go on with the last conversation, or with --session's.")]
SessionName = Annotated[
    str | None, _option("--session", metavar="NAME", help="Save under this name (or directory) instead of `last`.")
]
Save = Annotated[bool, _option("--save/--no-save", help="Save the conversation after each turn, and what was typed; of a question on stdin only with --session or --continue.")]
ThinkBudget = Annotated[
    str, _option("--think-budget", metavar="N|auto|off", help="Most tokens of thinking a reply; auto keeps room for the answer.")
]
Thinking = Annotated[str, _option("--thinking", metavar="HOW", help="Thinking in the terminal: fold (one live line), show or hide.")]
KeepThinking = Annotated[
    bool, _option("--keep-thinking/--drop-thinking", help="Keep the thinking of earlier turns; templates drop it.")
]
KvBudget = Annotated[
    str,
    typer.Option(
        "--kv-budget", metavar="TOKENS|SIZE|auto", rich_help_panel="KV cache",
        help="Cells of KV cache, never exceeded: 512, 4k, 64MiB, or what `zoomr plan` would choose.",
    ),
]  # fmt: skip


def chat(
    question: Question = None,
    system: System = None,
    continue_: Continue = False,
    session: SessionName = None,
    save: Save = True,
    think_budget: ThinkBudget = "auto",
    thinking: Thinking = "fold",
    keep_thinking: KeepThinking = False,
    trace: options.Trace = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    model: options.Model = None,
    n_gpu_layers: options.GpuLayers = 0,
    threads: options.Threads = None,
    policy: options.Policy = "zoomr",
    kv_budget: KvBudget = DEFAULT_BUDGET,
    kv_type: options.KvType = "f16",
    flash_attn: options.FlashAttn = True,
    kv_ram: options.KvRam = "1GiB",
    kv_disk: options.KvDisk = "8GiB",
    kv_dir: options.KvDir = None,
    kv_page_type: options.KvPageType = "f16",
    on_full: options.OnFull = "drop",
    wait_for_disk: options.WaitForDisk = False,
    refresh: options.Refresh = None,
    votes_per_head: options.VotesPerHead = None,
    zoomed_blocks: options.ZoomedBlocks = None,
    window: options.Window = None,
    vote_window: options.VoteWindow = None,
    vote_layers: options.VoteLayers = None,
    summary_rows: options.SummaryRows = None,
    summaries: options.Summaries = "auto",
    thought_min: options.ThoughtMin = None,
    summary_max: options.SummaryMax = None,
    sinks: options.Sinks = 4,
    max_tokens: options.MaxTokens = 4096,
    temp: options.Temperature = 0.6,
    top_k: options.TopK = 40,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.05,
    repeat_penalty: options.RepeatPenalty = 1.0,
    repeat_last_n: options.RepeatLastN = 64,
    seed: options.Seed = 0,
    stop: options.Stop = None,
) -> int:
    """Talk with a model in the terminal, or answer one question, given here or on stdin; the conversation has no window."""
    from zoomr_local.policies import POLICIES
    from zoomr_local.thinking import budget_of

    from .chat_input import decoded
    from .chat_loop import ChatLoop, default_name
    from .chat_models import ChatModels
    from .chat_store import LAST, ChatStore, user_path
    from .chat_view import FOLD, HIDE, SHOW, Screen
    from .solve import open_engine
    from .summaries import say

    if POLICIES[options.known_policy(policy)].unit not in ("all", "block", "token"):
        raise UsageError(f"--policy {policy} has no conversations; choose another policy")
    if sys.stdin is None or sys.stdout is None:
        raise UsageError("stdin or stdout is closed; a chat reads the one and writes to the other")
    store = ChatStore()
    budget_of(think_budget, max_tokens)
    if thinking not in (FOLD, SHOW, HIDE):
        raise UsageError(f"--thinking {thinking}: choose fold, show or hide")
    interactive = question is None and sys.stdin.isatty()
    name = default_name(session, save, interactive or continue_)
    if interactive and as_json:
        raise UsageError("--json is for a single question: zoomr chat --json QUESTION, or give it on stdin")
    if interactive and not sys.stdout.isatty():
        raise UsageError("a chat needs a terminal on stdout; to write an answer to a file: zoomr chat QUESTION, or give it on stdin")
    held = (session or continue_ or (interactive and save)) and store.holds(session or LAST)
    if continue_ and not held:
        raise UsageError(f"no conversation is saved in {store.path(session or LAST)}; leave out --continue")
    if session and not save and not continue_:
        raise UsageError(f"--session {session} saves the conversation and --no-save does not; leave one of them out")
    if session and held and not continue_:
        raise UsageError(f"--session {session} holds a conversation; go on with it by --continue, or choose another name")
    editor = _editor(store, save) if interactive else None
    asked = b"" if interactive else _asked(question)

    from zoomr_local.conversation import Conversation
    from zoomr_local.engine import EngineConfig  # loads the native library
    from zoomr_local.sampling import SamplingParams

    tiers = options.tiers(kv_ram, kv_disk, kv_dir, kv_page_type, on_full, wait_for_disk)
    planned = {"kv_type": kv_type, "flash_attn": flash_attn, "n_gpu_layers": n_gpu_layers, "kv_ram_bytes": tiers["kv_ram"]}
    sampling = SamplingParams(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, tuple(stop or ()))

    first = options.model_path(model)

    def opened(name: str | None) -> Any:
        path = first if name is None else options.model_path(user_path(name))
        budget = {} if policy == "full" and kv_budget == DEFAULT_BUDGET else options.budget(policy, kv_budget, path, quiet, **planned)
        config = EngineConfig(
            policy=policy, **budget, kv_type=kv_type, flash_attn=flash_attn, threads=options.thread_count(threads, path),
            refresh=refresh, votes_per_head=votes_per_head, zoomed_blocks=zoomed_blocks, window=window, vote_window=vote_window,
            vote_layers=options.layer_list(vote_layers), summary_rows=summary_rows, sinks=sinks, seed=seed,
            summaries=summaries, thought_min=thought_min, summary_max=summary_max, **tiers,
        )  # fmt: skip
        return open_engine(path, config, n_gpu_layers)

    notes.without_gpu(n_gpu_layers)
    notes.bundled(first, None if interactive else [os.fsdecode(asked)], quiet)
    with ChatModels(opened, lambda engine: tracing.recording(trace, engine, sampling, max_tokens, quiet)) as models:
        loaded, engine = models.first()
        say(engine, quiet)
        talk = Conversation(loaded, engine, system or None, keep_thinking)
        loop = ChatLoop(talk, store, Screen(quiet), sampling, max_tokens, think_budget, thinking, name)
        loop.models, loop.asked = models, bool(session or continue_)
        if continue_:
            _go_on(loop, session or LAST)
            if not save:
                loop.screen.note("what is said now is not kept (--no-save)")
            if system is not None:
                talk.set_system(system)
        if editor is None:
            return _single(loop, decoded(asked, "stdin" if question is None else "the question", loop.screen.say).strip(), as_json)
        cells = f", {engine.config.kv_budget:,} cells" if policy != "full" else ""
        loop.screen.note(f"{loaded.name}, policy {policy}{cells}; /help lists the commands")
        loop.run(editor)
        return 1 if loop.failed else 0


def _go_on(loop: Any, name: str) -> None:
    """Take up the conversation ``name``. Raises SessionError with what else there is."""
    try:
        loop.load(name, loop.screen.note)
    except SessionError as error:
        others = [other for other in loop.store.names() if other != name]
        more = f", or give --session one of {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}" if others else ""
        raise SessionError(f"{error}; begin without --continue{more}") from None


def _asked(question: str | None) -> bytes:
    """The single question: what was given, else all of stdin."""
    found = sys.stdin.buffer.read() if question is None else os.fsencode(question)
    if not found.strip():
        raise UsageError("there is no question on stdin" if question is None else "the question is empty")
    return found.strip()


def _editor(store: Any, save: bool) -> Any:
    from .chat_commands import Commands
    from .chat_input import LineEditor
    from .chat_loop import history_file

    return LineEditor(lambda: Commands.completions(store.names(), list(options.bundled_models())), history_file(store, save))


def _single(loop: ChatLoop, question: str, as_json: bool) -> int:
    """One question from a pipe: the answer, or one JSON object, on stdout.

    1 if there is no answer, or if it could not be kept by name as was asked, 130 if interrupted.
    """
    loop.rescue = "the answer is on stdout, and nowhere else"
    if as_json:
        loop.screen.answer = lambda text: None  # type: ignore[method-assign]
    done = loop.answer(question)
    if done is None:
        return 1
    if as_json:
        print(json.dumps(_record(done)))
    elif done.content.strip() and not done.content.endswith("\n"):
        print(flush=True)
    if done.reason == "cancelled":
        return 130
    return 0 if done.content.strip() and not loop.failed else 1


def _record(done: Finished) -> dict[str, Any]:
    from zoomr_local.solve import kv_record

    return {
        "answer": done.content, "reasoning": done.reasoning, "finish_reason": done.reason, "thinking_cut": done.thinking_cut,
        "usage": {
            "prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens, "reasoning_tokens": done.reasoning_tokens,
        },
        "timing": {"prefill_s": round(done.prefill_seconds, 6), "decode_s": round(done.decode_seconds, 6)},
        "kv": kv_record(done.cache),
    }  # fmt: skip
