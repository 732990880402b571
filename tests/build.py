"""Small builders for tests: safetensors files from literal bytes, and a tiny checkpoint without two equal sizes.

Nothing here uses tpshard's own writer or reader, so that both can be held against it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16, "F16": 16, "U16": 16,
    "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """As a NumPy array: of the dtype where NumPy has it, of bytes along a last axis otherwise."""
        if self.dtype in NUMPY:
            return np.frombuffer(self.data, NUMPY[self.dtype]).reshape(self.shape)
        width = BITS[self.dtype] // 8
        return np.frombuffer(self.data, np.uint8).reshape(*self.shape, width)


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes; of a float type finite, of BOOL 0 and 1."""
    rng = np.random.default_rng([seed, *shape])
    count = math.prod(shape)
    if dtype in ("F64", "F32", "F16"):
        return Tensor(dtype, shape, rng.standard_normal(count).astype(NUMPY[dtype]).tobytes())
    if dtype == "BOOL":
        return Tensor(dtype, shape, rng.integers(0, 2, count, np.uint8).tobytes())
    return Tensor(dtype, shape, rng.integers(0, 256, count * BITS[dtype] // 8, np.uint8).tobytes())


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor's header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: bytes | str | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """``u64 length | header | data``; ``length`` replaces the true one."""
    if isinstance(header, Mapping):
        header = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with the tensors in the order given, its header padded as safetensors pads it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, held in tensors.items():
        header[name] = entry(held.dtype, list(held.shape), at, at + len(held.data))
        at += len(held.data)
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(file_bytes(raw, b"".join(held.data for held in tensors.values())))
    return path


def load(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by a reader of eight lines."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, value in header.items():
        begin, end = (8 + length + offset for offset in value["data_offsets"])
        found[name] = Tensor(value["dtype"], tuple(value["shape"]), raw[begin:end])
    return found


def metadata_of(path: Path) -> dict[str, str]:
    """A file's metadata."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]).get("__metadata__", {})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative path, hidden ones too; what is no file is marked."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"(not a file)"
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


# ---------------------------------------------------------------------------------------------- a tiny checkpoint

HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB, LAYERS = 6, 10, 44, 52, 1003, 3

POLICY = """\
name: tiny
for: {model_type: tiny}
vars:
  H: num_attention_heads
  K: num_key_value_heads
rules:
  embed_tokens: {rule: row, dims: io}
  self_attn.q_proj: {rule: column, heads: H}
  self_attn.{k_proj,v_proj}: {rule: column, heads: K}
  self_attn.o_proj: {rule: row, heads: H}
  mlp.{gate_proj,up_proj}: column
  mlp.down_proj: row
  "{input_layernorm,post_attention_layernorm,norm}": replicate
  lm_head: {rule: column, pad: 8, gather: true}
"""


def config(kv_heads: int = 3, **more: Any) -> dict[str, Any]:
    """config.json of the tiny checkpoint."""
    return {
        "model_type": "tiny",
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        **more,
    }


def tiny_shapes(kv_heads: int = 3, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tiny checkpoint, all sizes distinct."""
    q, kv = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", q, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, q),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ):
            shapes[f"{at}.{name}.weight"] = (rows, columns)
            shapes[f"{at}.{name}.bias"] = (rows,)
        shapes[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def tiny_tensors(kv_heads: int = 3, dtype: str = "F32", layers: int = LAYERS) -> dict[str, Tensor]:
    """The tiny checkpoint's tensors, in the order of their names."""
    shapes = tiny_shapes(kv_heads, layers)
    return {name: tensor(dtype, shapes[name], seed) for seed, name in enumerate(sorted(shapes))}


def tiny_checkpoint(
    folder: Path, kv_heads: int = 3, dtype: str = "F32", files: int = 1, layers: int = LAYERS
) -> dict[str, Tensor]:
    """The tiny checkpoint in a new folder: config.json, tokenizer files, one file or several with an index."""
    folder.mkdir(parents=True)
    tensors = tiny_tensors(kv_heads, dtype, layers)
    write_checkpoint(folder, tensors, files)
    (folder / "config.json").write_text(json.dumps(config(kv_heads, num_hidden_layers=layers)))
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return tensors


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], files: int = 1) -> None:
    """``model.safetensors``, or ``files`` files, dealt in turn, and an index."""
    if files == 1:
        save(folder / "model.safetensors", tensors, {"format": "pt"})
        return
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    place = {name: names[number % files] for number, name in enumerate(tensors)}
    for file in names:
        save(folder / file, {name: tensors[name] for name in tensors if place[name] == file}, {"format": "pt"})
    total = sum(len(held.data) for held in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def expected_shards(tensors: Mapping[str, Tensor], kv_heads: int, ranks: int) -> list[dict[str, np.ndarray]]:
    """What POLICY makes of the tiny checkpoint, by NumPy slicing written out by hand."""
    shards: list[dict[str, np.ndarray]] = []
    for rank in range(ranks):
        q = np.array_split(np.arange(HEADS * HEAD_DIM).reshape(HEADS, HEAD_DIM), ranks)[rank].ravel()
        ffn = np.array_split(np.arange(FFN), ranks)[rank]
        vocab = np.array_split(np.arange(VOCAB), ranks)[rank]
        if kv_heads >= ranks:
            kv_units = np.array_split(np.arange(kv_heads), ranks)[rank]
        else:
            kv_units = np.repeat(np.arange(kv_heads), ranks // kv_heads)[rank : rank + 1]
        kv = np.concatenate([np.arange(HEAD_DIM) + unit * HEAD_DIM for unit in kv_units])
        padded_vocab = -(-VOCAB // (8 * ranks)) * 8
        own: dict[str, np.ndarray] = {}
        for name, held in tensors.items():
            whole = held.array()
            layer, leaf = name.split(".")[-2:]
            match layer:
                case "embed_tokens":
                    own[name] = whole[vocab]
                case "q_proj":
                    own[name] = whole[q]
                case "k_proj" | "v_proj":
                    own[name] = whole[kv]
                case "gate_proj" | "up_proj":
                    own[name] = whole[ffn]
                case "o_proj":
                    own[name] = whole[:, q] if leaf == "weight" else whole
                case "down_proj":
                    own[name] = whole[:, ffn] if leaf == "weight" else whole
                case "lm_head":
                    own[name] = np.zeros((padded_vocab, *whole.shape[1:]), whole.dtype)
                    mine = whole[rank * padded_vocab : (rank + 1) * padded_vocab]
                    own[name][: len(mine)] = mine
                case _:
                    own[name] = whole
        shards.append(own)
    return shards


def policy_file(folder: Path, text: str = POLICY) -> str:
    """A policy file in a folder; returns its path as the command line takes it."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return str(path)
