"""Checkpoints to measure on: a Llama of random numbers, and the headers alone of a very large mixture of experts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpshard.header import header_bytes

Named = tuple[str, tuple[int, ...]]

FILE_LIMIT = 5 * 10**9
CHUNK = 2**24
DEEPSEEK_FILES = 163

SMALL_POLICY = "name: small\nrules: {linear: column}\n"

# Block biases beside the weights: as many tensors as the FP8 original has with its scales.
DEEPSEEK_POLICY = """\
name: deepseek-bench
vars: {H: num_attention_heads}
rules:
  embed_tokens: {rule: row, dims: io}
  self_attn.{q_a_proj,kv_a_proj_with_mqa,q_a_layernorm,kv_a_layernorm}: replicate
  self_attn.{q_b_proj,kv_b_proj}: {rule: column, heads: H}
  self_attn.o_proj: {rule: row, heads: H}
  "mlp.experts.*.{gate_proj,up_proj}": column
  "mlp.experts.*.down_proj": row
  mlp.shared_experts.{gate_proj,up_proj}: column
  mlp.shared_experts.down_proj: row
  mlp.gate: replicate
  "{input_layernorm,post_attention_layernorm,norm}": replicate
  lm_head: {rule: column, gather: true}
"""


def small(folder: Path, count: int) -> Path:
    """One file of ``count`` tensors of 1 KB each, random numbers in BF16."""
    folder.mkdir(parents=True)
    names = [(f"layers.{number}.linear.weight", "BF16", (16, 32)) for number in range(count)]
    data = np.random.default_rng(0).integers(0, 256, count * 1024, np.uint8)
    (folder / "model.safetensors").write_bytes(header_bytes(names, {"format": "pt"}) + data.tobytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "small"}))
    return folder


def llama(folder: Path, size: int, *, sparse: bool = False) -> Path:
    """A Llama-shaped checkpoint of about ``size`` bytes: as many layers as fit, at least one. ``sparse``: of holes."""
    hidden, inner = (2048, 8192) if size < 4 * 10**9 else (4096, 14336)
    vocabulary, key_value = 128256, 8 * (hidden // 32)
    layer = 2 * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner)
    layers = max(1, round((size - 4 * vocabulary * hidden) / layer))
    return llama_of(folder, hidden, inner, vocabulary, heads=32, key_value_heads=8, layers=layers, sparse=sparse)


def llama_of(
    folder: Path,
    hidden: int,
    inner: int,
    vocabulary: int,
    heads: int,
    key_value_heads: int,
    layers: int,
    sparse: bool = False,
) -> Path:
    """A Llama of these sizes, random numbers in BF16."""
    key_value = key_value_heads * (hidden // heads)
    tensors: list[Named] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for number in range(layers):
        block = f"model.layers.{number}"
        tensors += [
            (f"{block}.input_layernorm.weight", (hidden,)),
            (f"{block}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{block}.self_attn.k_proj.weight", (key_value, hidden)),
            (f"{block}.self_attn.v_proj.weight", (key_value, hidden)),
            (f"{block}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{block}.post_attention_layernorm.weight", (hidden,)),
            (f"{block}.mlp.gate_proj.weight", (inner, hidden)),
            (f"{block}.mlp.up_proj.weight", (inner, hidden)),
            (f"{block}.mlp.down_proj.weight", (hidden, inner)),
        ]
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
    }
    _write(folder, _by_size(tensors), config, sparse=sparse)
    return folder


def deepseek(folder: Path) -> Path:
    """The headers of a DeepSeek-V3-shaped checkpoint, 1.4 TB of holes behind them, and ``policy.yaml`` beside it."""
    hidden, inner, heads = 7168, 2048, 128
    tensors: list[Named] = [("model.embed_tokens.weight", (129280, hidden))]
    for number in range(61):
        block = f"model.layers.{number}"
        attention = f"{block}.self_attn"
        tensors += [
            (f"{block}.input_layernorm.weight", (hidden,)),
            (f"{block}.post_attention_layernorm.weight", (hidden,)),
            (f"{attention}.q_a_proj.weight", (1536, hidden)),
            (f"{attention}.q_a_layernorm.weight", (1536,)),
            (f"{attention}.q_b_proj.weight", (heads * 192, 1536)),
            (f"{attention}.kv_a_proj_with_mqa.weight", (576, hidden)),
            (f"{attention}.kv_a_layernorm.weight", (512,)),
            (f"{attention}.kv_b_proj.weight", (heads * 256, 512)),
            (f"{attention}.o_proj.weight", (hidden, heads * 128)),
            (f"{block}.mlp.gate.weight", (256, hidden)),
            (f"{block}.mlp.gate.e_score_correction_bias", (256,)),
        ]
        for expert in ("shared_experts", *(f"experts.{index}" for index in range(256))):
            for layer, out, into in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
                name = f"{block}.mlp.{expert}.{layer}_proj"
                tensors += [(f"{name}.weight", (out, into)), (f"{name}.bias", (out,))]
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (129280, hidden))]
    each = -(-len(tensors) // DEEPSEEK_FILES)
    groups = [tensors[at : at + each] for at in range(0, len(tensors), each)]
    config = {"model_type": "deepseek_v3", "num_attention_heads": heads, "num_hidden_layers": 61, "vocab_size": 129280}
    _write(folder, groups, config, sparse=True)
    folder.with_name("policy.yaml").write_text(DEEPSEEK_POLICY)
    return folder


def _by_size(tensors: Sequence[Named]) -> list[list[Named]]:
    groups: list[list[Named]] = [[]]
    filled = 0
    for named in tensors:
        size = 2 * math.prod(named[1])
        if groups[-1] and filled + size > FILE_LIMIT:
            groups.append([])
            filled = 0
        groups[-1].append(named)
        filled += size
    return groups


def _write(folder: Path, groups: Sequence[Sequence[Named]], config: dict[str, Any], *, sparse: bool) -> None:
    folder.mkdir(parents=True)
    weight_map = {}
    total = 0
    rng = np.random.default_rng(0)
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        size = sum(2 * math.prod(shape) for _, shape in group)
        with (folder / name).open("wb", buffering=0) as file:
            file.write(header_bytes(((tensor, "BF16", shape) for tensor, shape in group), {"format": "pt"}))
            if sparse:
                os.ftruncate(file.fileno(), file.tell() + size)
            else:
                for chunk in _random(rng, size):
                    file.write(chunk)
        weight_map.update({tensor: name for tensor, _ in group})
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _random(rng: np.random.Generator, size: int) -> Iterator[bytes]:
    """BF16 numbers between 0.002 and 0.03, of either sign: no NaN, and sums of a trained model's size."""
    while size:
        count = min(size, CHUNK)
        bits = np.frombuffer(rng.bytes(count), np.uint16)
        yield ((bits & 0x807F) | (118 + (bits >> 7) % 4) << 7).astype(np.uint16).tobytes()
        size -= count
