"""Export a trained network as GGUF: `python -m models.export CHECKPOINT OUT.gguf --type q8_0`.

Owned by models/. Needs torch, numpy and gguf (the extra `train`). The file loads in unpatched
llama.cpp: architecture `llama`, GPT-2 tokenizer. The keys `zoomr.*` are the model's own
defaults for a runtime that pages thoughts; others ignore them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pickle import UnpicklingError

import gguf
import numpy as np
import torch

from . import tokenizer as tok
from .tasks import LONG_THOUGHTS, generate, prompt_text
from .train.network import Network, Shape

CONTEXT = 4096  # as many positions as were trained
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
DEFAULTS = {"window": 64, "votes_per_head": 0, "zoomed_blocks": 2, "vote_window": 8, "summary_rows": 2}
VOTE_LAYERS = (2, 3)
_LAYER_NAMES = {
    "norm1": "attn_norm", "norm2": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down", "attention.wq": "attn_q", "attention.wk": "attn_k",
    "attention.wv": "attn_v", "attention.wo": "attn_output",
}  # fmt: skip
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def load_network(checkpoint: Path, averaged: bool = True) -> tuple[Network, dict]:
    """The network of a training checkpoint and the checkpoint's other entries, or of an exported file, which has none. Raises ValueError for others."""
    if checkpoint.suffix == ".gguf":
        return network_of_gguf(checkpoint), {}
    try:
        state = torch.load(checkpoint, weights_only=True)
        net = Network(Shape(**state["shape"]))
        net.load_state_dict(state["average" if averaged else "net"])
    except (KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of a training run: {type(error).__name__}: {error}".splitlines()[0]) from error
    return net.eval(), state


def mean_network(checkpoints: list[Path]) -> tuple[Network, dict]:
    """The network whose weights are the mean of those of several checkpoints of one run's stages, and the last one's other entries.

    Raises ValueError if they are of different shapes.
    """
    nets = [load_network(path) for path in checkpoints]
    if any(net.shape != nets[0][0].shape for net, _ in nets):
        raise ValueError("checkpoints of different shapes have no mean")
    weights = [net.state_dict() for net, _ in nets]
    net, state = nets[-1]
    net.load_state_dict({name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]})
    return net, state


def network_of_gguf(path: Path) -> Network:
    """The network that was exported to a file, as its types have left it. Raises ValueError for a file that is none."""
    try:
        reader = gguf.GGUFReader(path)
        said = {name.removeprefix("llama."): reader.fields[name].contents() for name in reader.fields if name.startswith("llama.")}
        shape = Shape(
            vocab=said["vocab_size"], layers=said["block_count"], width=said["embedding_length"], heads=said["attention.head_count"],
            kv_heads=said["attention.head_count_kv"], ff=said["feed_forward_length"],
            rope_base=_decimal(said["rope.freq_base"]), eps=_decimal(said["attention.layer_norm_rms_epsilon"]),
        )  # fmt: skip
        tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
        net = Network(shape)
        net.load_state_dict({ours: tensors[theirs] for ours, theirs in _names(shape.layers).items()})
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path} is no model that models.export wrote: {type(error).__name__}: {error}".splitlines()[0]) from error
    return net.eval()


def _decimal(value: float) -> float:
    """The number that was written, of what a float32 made of it."""
    return float(str(np.float32(value)))


def _names(layers: int) -> dict[str, str]:
    named = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    for i in range(layers):
        for ours, theirs in _LAYER_NAMES.items():
            named[f"blocks.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    return named


def tensor_names(net: Network) -> dict[str, np.ndarray]:
    """Every weight under its GGUF name, float32, rows as PyTorch has them."""
    named, weights = _names(net.shape.layers), net.state_dict()
    assert set(weights) == set(named)
    return {named[k]: v.numpy() for k, v in weights.items()}


def _add_tokenizer(writer: gguf.GGUFWriter, summaries: bool, beacon: bool) -> None:
    control = len(tok.SPECIALS)
    kinds = [gguf.TokenType.CONTROL] * control
    kinds += [gguf.TokenType.NORMAL] * (len(tok.TOKENS) - control)
    kinds += [gguf.TokenType.CONTROL] * beacon
    texts = [*tok.TOKENS, *[tok.BEACON_TEXT] * beacon]
    if not summaries:  # a runtime would take the markers for a promise
        for marker in (tok.BEGIN_SUMMARY, tok.END_SUMMARY):
            texts[marker], kinds[marker] = f"<|unused_{marker}|>", gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{a} {b}" for a, b in tok.MERGES])
    writer.add_pad_token_id(tok.PAD)
    writer.add_bos_token_id(tok.PAD)
    writer.add_eos_token_id(tok.IM_END)
    writer.add_eot_token_id(tok.IM_END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_dim)


def _add_settings(writer: gguf.GGUFWriter, summaries: bool, beacon_every: tuple[int, ...]) -> None:
    if beacon_every:
        writer.add_string("zoomr.beacon_every", ",".join(map(str, beacon_every)))
    if not summaries:
        return  # nothing was chosen for the votes of what it does not write
    for key, value in DEFAULTS.items():
        writer.add_uint32(f"zoomr.{key}", value)
    if VOTE_LAYERS:
        writer.add_string("zoomr.vote_layers", ",".join(map(str, VOTE_LAYERS)))  # llama.cpp hands out no arrays


def write_gguf(
    net: Network, path: Path, kind: str, name: str = "zoomr-tiny", beacon_every: tuple[int, ...] = (), summaries: bool = True
) -> None:
    """Write `net` to `path` as `kind`: f32, f16 or q8_0 (norms stay f32; output is tied).

    A network with one row more than the vocabulary has the beacon's, and `beacon_every` is after how many tokens
    it was trained with one: the numbers a runtime may choose from, the first one unless it is told.
    Without `summaries`, as with a beacon, the markers of summaries are unused tokens and nothing is said of votes.
    Raises ValueError if one is there without the other.
    """
    if (net.shape.vocab == tok.BEACON + 1) != bool(beacon_every) or min(beacon_every, default=1) < 1:
        raise ValueError(
            f"a network of {net.shape.vocab} rows and --beacon-every {','.join(map(str, beacon_every)) or 'left out'}: a network with"
            f" a beacon has {tok.BEACON + 1} and needs what it was trained with, 1 or more; any other has none"
        )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    _add_shape(writer, net.shape)
    summaries = summaries and not beacon_every
    _add_tokenizer(writer, summaries, bool(beacon_every))
    _add_settings(writer, summaries, beacon_every)
    for key, weight in tensor_names(net).items():
        if weight.ndim == 1 or kind == "f32":
            writer.add_tensor(key, weight)
        elif kind == "f16":
            writer.add_tensor(key, weight.astype(np.float16))
        else:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(weight, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fixture_texts() -> list[str]:
    """Texts whose token ids are pinned: every family, the chat frame, and odd UTF-8."""
    texts = []
    for family in LONG_THOUGHTS:
        for problem in generate(family, 2, seed=7, thoughts=5, split="dev"):
            texts.append(prompt_text(problem.prompt) + problem.trace)
    texts += [
        "", " ", "  two  spaces ", "tab\tand\nnewline\n\n  indented", "100 007 1234 5.6e-7",
        "It's we'll they've I'd 'tis don'T", "naïve café Ünïcödé ß ø", "Привет, мир! Ёж",
        "日本語のテキスト。中文", "مرحبا بالعالم", "हिन्दी में", "🙂👩‍👩‍👧 emoji ½ ² Ⅷ",
        "e\u0301 combining \u200d joiner \ufeff bom", "a\u00a0nbsp\u3000wide\u2028line",
        "\x00\x01\x7f control", "oak.elm,ash;fig is42 oak", "<|im_start|>x<think>y</think>z<|im_end|>",
    ]  # fmt: skip
    return texts


def write_fixture(net: Network, path: Path) -> None:
    """Pin token ids, and f32 logits of one text at its last position, for tests without torch."""
    texts = fixture_texts()
    ids = torch.tensor([tok.encode(texts[0])])
    with torch.no_grad():
        last = net.logits(net(ids)[0][0, -1])
    pinned = {
        "ids": [{"text": t, "ids": tok.encode(t)} for t in texts],
        "logits": [round(x, 4) for x in last.tolist()],
    }
    path.write_text(json.dumps(pinned, ensure_ascii=True) + "\n")


def write_demo(path: Path) -> None:
    """Write two test-split problems of every family, of the length of the test sets, in turn."""
    families = [generate(f, 2, seed=2026, thoughts=thoughts, split="test") for f, thoughts in LONG_THOUGHTS.items()]
    lines = []
    for group in zip(*families, strict=True):
        for p in group:
            lines.append(json.dumps({"id": p.id, "prompt": p.prompt, "answer": p.answer}))
    path.write_text("\n".join(lines) + "\n")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="+", help="of several, the mean of their weights is exported")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=sorted(_FILE_TYPES), default="q8_0")
    parser.add_argument("--name", default="zoomr-tiny", help="what the file calls the model")
    parser.add_argument(
        "--beacon-every", type=_numbers, default=(), metavar="N,N",
        help="of a Breadcrumbs model: after how many tokens a beacon came in training; the first is the default",
    )
    parser.add_argument("--plain", action="store_true", help="of a model that was trained without summaries")
    parser.add_argument("--fixture", type=Path, help="also write pinned ids and logits here")
    parser.add_argument("--demo", type=Path, help="also write the demo problems here")
    args = parser.parse_args()
    part = args.out.with_suffix(".part")  # a kill must not leave half a model under the name of a whole one
    try:
        net, state = mean_network(args.checkpoint)
        write_gguf(net, part, args.type, args.name, args.beacon_every, not args.plain)
    except ValueError as error:
        parser.error(str(error))
    part.replace(args.out)
    if args.fixture:
        write_fixture(net, args.fixture)
    if args.demo:
        write_demo(args.demo)
    print(f"{args.out}: {args.out.stat().st_size} bytes" + (f", step {state['step']}" if state else ""))


if __name__ == "__main__":
    main()
