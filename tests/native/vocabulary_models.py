"""Writes small random-weight GGUFs of real architectures around the real vocabularies that llama.cpp ships.

A vocabulary's metadata is copied byte for byte out of the vocabulary-only file; what a model family added to a
vocabulary that it took over (Qwen3 to Qwen2's, R1-Distill to Llama 3's) is put into its place. Tests only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np

N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF, N_LAYER = 64, 2, 1, 32, 64, 2
TRAINED_TOKENS = 4096
CONTROL, USER_DEFINED = 3, 4
TEXT, ARRAY, INT = 8, 9, 5
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class Vocabulary:
    """``values``: type and value of every key, as in the file; ``tokens``: the texts; ``types``: their token types."""

    values: dict[str, bytes]
    tokens: list[bytes]
    types: list[int]

    @property
    def special(self) -> dict[bytes, int]:
        """Control tokens and those that users defined, by text."""
        return {text: i for i, (text, kind) in enumerate(zip(self.tokens, self.types)) if kind in (CONTROL, USER_DEFINED)}

    def changed(self, tokens: dict[int, tuple[str, int]], **values: bytes) -> Vocabulary:
        """With other texts and types at some ids (past the end: in order), and other values."""
        texts, types = list(self.tokens), list(self.types)
        for at, (text, kind) in sorted(tokens.items()):
            if at == len(texts):
                texts.append(b"")
                types.append(0)
            texts[at], types[at] = text.encode(), kind
        return Vocabulary({**self.values, **values}, texts, types)

    def packed(self) -> list[bytes]:
        """The key-value pairs of the tokenizer."""
        head = struct.pack("<IIQ", ARRAY, TEXT, len(self.tokens))
        lists = {
            "tokenizer.ggml.tokens": head + b"".join(_text(token) for token in self.tokens),
            "tokenizer.ggml.token_type": struct.pack("<IIQ", ARRAY, INT, len(self.types)) + np.array(self.types, "<i4").tobytes(),
        }
        values = {key: value for key, value in self.values.items() if key.startswith("tokenizer.")}
        return [_text(key.encode()) + value for key, value in {**values, **lists}.items()]


def read_vocabulary(path: Path) -> Vocabulary:
    """The metadata of a vocabulary-only file."""
    data, at = path.read_bytes(), 24
    magic, _, _, count = struct.unpack_from("<4sIQQ", data)
    assert magic == b"GGUF", path
    values: dict[str, bytes] = {}
    tokens: list[bytes] = []
    types: list[int] = []
    for _ in range(count):
        key, at = _read_text(data, at)
        start, (kind,) = at, struct.unpack_from("<I", data, at)
        at += 4
        if kind == ARRAY:
            element, length = struct.unpack_from("<IQ", data, at)
            at += 12
            texts = []
            for _ in range(length if element == TEXT else 0):
                text, at = _read_text(data, at)
                texts.append(text)
            if key == b"tokenizer.ggml.tokens":
                tokens = texts
            elif key == b"tokenizer.ggml.token_type":
                types = np.frombuffer(data, "<i4", length, at).tolist()
            at += 0 if element == TEXT else _SIZES[element] * length
        else:
            at += 8 + struct.unpack_from("<Q", data, at)[0] if kind == TEXT else _SIZES[kind]
        values[key.decode()] = data[start:at]
    return Vocabulary(values, tokens, types or [1] * len(tokens))


def text_value(text: str) -> bytes:
    """Type and value of a text."""
    return struct.pack("<I", TEXT) + _text(text.encode())


def int_value(number: int) -> bytes:
    """Type and value of an unsigned whole number of 32 bits."""
    return struct.pack("<II", 4, number)


@dataclass
class ModelFile:
    """A GGUF under construction: packed key-value pairs and tensors, the latter drawn from a seeded stream."""

    arch: str
    n_vocab: int
    values: list[bytes] = field(default_factory=list)
    tensors: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(7)

    def put(self, key: str, value: int | float | str | bool | list[bool]) -> None:
        """A value; of a key without a dot in front the architecture's."""
        if isinstance(value, bool):
            packed = struct.pack("<I?", 7, value)
        elif isinstance(value, int):
            packed = int_value(value)
        elif isinstance(value, float):
            packed = struct.pack("<If", 6, value)
        elif isinstance(value, str):
            packed = text_value(value)
        else:
            packed = struct.pack("<IIQ", ARRAY, 7, len(value)) + bytes(value)
        self.values.append(_text((key if key.startswith(("general.", "tokenizer.")) else f"{self.arch}.{key}").encode()) + packed)

    def matrix(self, name: str, n_out: int, n_in: int, *batch: int, gain: float = 1.0) -> None:
        """float16 weights that keep a vector's length."""
        drawn = self._rng.standard_normal((*batch, n_out, n_in), np.float32) * np.float32(gain / np.sqrt(n_in))
        self.tensors.append((name + ".weight", drawn.astype(np.float16)))

    def vector(self, name: str, *shape: int, mean: float = 0.0) -> None:
        """float32 numbers near ``mean``."""
        self.tensors.append((name, (mean + 0.1 * self._rng.standard_normal(shape)).astype(np.float32)))

    def write(self, path: Path) -> None:
        """Write the file: header, tensor descriptions, weights."""
        infos, offset = [], 0
        for name, data in self.tensors:
            dims = data.shape[::-1]
            kind = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}[data.dtype]
            infos.append(_text(name.encode()) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
            offset += -(-data.nbytes // 32) * 32
        with path.open("wb") as file:
            file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.values)) + b"".join(self.values + infos))
            for _, data in self.tensors:
                file.write(bytes(-file.tell() % 32))
                file.write(data.tobytes())
            file.write(bytes(-file.tell() % 32))


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _read_text(data: bytes, at: int) -> tuple[bytes, int]:
    stop = at + 8 + struct.unpack_from("<Q", data, at)[0]
    return data[at + 8 : stop], stop


# ---------------------------------------------------------------- architectures


def _shape(m: ModelFile, *, rms: bool = True) -> None:
    for key, value in {
        "context_length": TRAINED_TOKENS, "embedding_length": N_EMBD, "block_count": N_LAYER, "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD_KV, "vocab_size": m.n_vocab, "rope.dimension_count": HEAD_DIM,
        "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon": 1e-6,
    }.items():  # fmt: skip
        m.put(key, value)
    m.matrix("token_embd", m.n_vocab, N_EMBD, gain=4.0)
    m.vector("output_norm.weight", N_EMBD, mean=1.0)


def _attention(m: ModelFile, b: str, *, bias: bool = False, norms: bool = False) -> None:
    m.vector(b + "attn_norm.weight", N_EMBD, mean=1.0)
    for name, rows in (("q", N_HEAD), ("k", N_HEAD_KV), ("v", N_HEAD_KV)):
        m.matrix(b + "attn_" + name, rows * HEAD_DIM, N_EMBD, gain=2.0)
        if bias:
            m.vector(f"{b}attn_{name}.bias", rows * HEAD_DIM)
        if norms and name != "v":
            m.vector(f"{b}attn_{name}_norm.weight", HEAD_DIM, mean=1.5)
    m.matrix(b + "attn_output", N_EMBD, N_HEAD * HEAD_DIM)


def _gated(m: ModelFile, b: str) -> None:
    m.matrix(b + "ffn_gate", N_FF, N_EMBD)
    m.matrix(b + "ffn_up", N_FF, N_EMBD)
    m.matrix(b + "ffn_down", N_EMBD, N_FF)


def llama(m: ModelFile) -> None:
    _llama_like(m)


def qwen2(m: ModelFile) -> None:
    _llama_like(m, bias=True)


def qwen3(m: ModelFile) -> None:
    _llama_like(m, norms=True)


def _llama_like(m: ModelFile, **attention: bool) -> None:
    _shape(m)
    for i in range(N_LAYER):
        _attention(m, f"blk.{i}.", **attention)
        m.vector(f"blk.{i}.ffn_norm.weight", N_EMBD, mean=1.0)
        _gated(m, f"blk.{i}.")


def command_r(m: ModelFile) -> None:
    """One norm for attention and feed-forward, the embedding as output."""
    _shape(m, rms=False)
    m.put("logit_scale", 0.5)
    for i in range(N_LAYER):
        _attention(m, f"blk.{i}.")
        _gated(m, f"blk.{i}.")


def phi3(m: ModelFile) -> None:
    """q, k, v in one matrix, gate and up in another."""
    _shape(m)
    for i in range(N_LAYER):
        b = f"blk.{i}."
        m.vector(b + "attn_norm.weight", N_EMBD, mean=1.0)
        m.matrix(b + "attn_qkv", N_EMBD + 2 * N_HEAD_KV * HEAD_DIM, N_EMBD, gain=2.0)
        m.matrix(b + "attn_output", N_EMBD, N_EMBD)
        m.vector(b + "ffn_norm.weight", N_EMBD, mean=1.0)
        m.matrix(b + "ffn_up", 2 * N_FF, N_EMBD)
        m.matrix(b + "ffn_down", N_EMBD, N_FF)


def gpt2(m: ModelFile) -> None:
    """Learned positions, biases everywhere."""
    _shape(m, rms=False)
    m.vector("output_norm.bias", N_EMBD)
    m.vector("position_embd.weight", TRAINED_TOKENS, N_EMBD)
    for i in range(N_LAYER):
        b = f"blk.{i}."
        rows = {"attn_qkv": N_EMBD + 2 * N_HEAD_KV * HEAD_DIM, "attn_output": N_EMBD, "ffn_up": N_FF, "ffn_down": N_EMBD}
        for name, n in rows.items():
            m.matrix(b + name, n, N_FF if name == "ffn_down" else N_EMBD)
            m.vector(f"{b}{name}.bias", n)
        for name in ("attn_norm", "ffn_norm"):
            m.vector(f"{b}{name}.weight", N_EMBD, mean=1.0)
            m.vector(f"{b}{name}.bias", N_EMBD)


def gemma4(m: ModelFile) -> None:
    """Layers with a sliding window and without in turn; norms before and behind."""
    _shape(m)
    m.put("attention.sliding_window", 64)
    m.put("attention.sliding_window_pattern", [i % 2 == 0 for i in range(N_LAYER)])
    m.put("attention.key_length_swa", HEAD_DIM)
    m.put("attention.value_length_swa", HEAD_DIM)
    m.put("rope.dimension_count_swa", HEAD_DIM)
    m.put("attention.shared_kv_layers", 0)
    m.put("embedding_length_per_layer_input", 0)
    m.put("final_logit_softcapping", 30.0)
    m.tensors.append(("rope_freqs.weight", np.ones(HEAD_DIM // 2, np.float32)))
    for i in range(N_LAYER):
        b = f"blk.{i}."
        _attention(m, b, norms=True)
        for name in ("post_attention_norm", "ffn_norm", "post_ffw_norm"):
            m.vector(f"{b}{name}.weight", N_EMBD, mean=1.0)
        _gated(m, b)


def gpt_oss(m: ModelFile) -> None:
    """Sliding windows in turn, attention sinks, experts with biases."""
    experts = 4
    _shape(m)
    m.matrix("output", m.n_vocab, N_EMBD)
    m.put("attention.sliding_window", 64)
    m.put("expert_count", experts)
    m.put("expert_used_count", 2)
    m.put("expert_feed_forward_length", N_FF)
    for i in range(N_LAYER):
        b = f"blk.{i}."
        _attention(m, b, bias=True)
        m.vector(b + "attn_output.bias", N_EMBD)
        m.vector(b + "post_attention_norm.weight", N_EMBD, mean=1.0)
        m.vector(b + "attn_sinks.weight", N_HEAD)
        m.matrix(b + "ffn_gate_inp", experts, N_EMBD)
        m.vector(b + "ffn_gate_inp.bias", experts)
        for name, rows, columns in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
            m.matrix(f"{b}ffn_{name}_exps", rows, columns, experts)
            m.vector(f"{b}ffn_{name}_exps.bias", experts, rows)


ARCHITECTURES: dict[str, Callable[[ModelFile], None]] = {
    "llama": llama, "qwen2": qwen2, "qwen3": qwen3, "command-r": command_r, "phi3": phi3, "gpt2": gpt2, "gemma4": gemma4,
    "gpt-oss": gpt_oss,
}  # fmt: skip


def write_model(path: Path, arch: str, vocabulary: Vocabulary, template: str | None = None) -> Path:
    """A model of ``arch`` (a key of ``ARCHITECTURES``) with this vocabulary; ``template`` (Jinja) in place of its own."""
    values = {} if template is None else {"tokenizer.chat_template": text_value(template)}
    vocabulary = vocabulary.changed({}, **values)
    m = ModelFile(arch, len(vocabulary.tokens), vocabulary.packed())
    m.put("general.architecture", arch)
    m.put("general.name", f"random {arch}")
    ARCHITECTURES[arch](m)
    m.write(path)
    return path
