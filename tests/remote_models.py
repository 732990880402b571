"""Small models with the names and fused orders of architectures whose code is not in transformers, for
``--model tests.remote_models:build``. Facts of their published code; what does not touch the weights (positions,
scales) is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

HIDDEN, HEAD, CHANNELS, WORDS = 56, 6, 52, 211
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v: [batch, positions, heads, head size]


@dataclass(frozen=True)
class Remote:
    """An architecture: its config, query and key-value heads, the names of its layers, and in what order fused weights
    are.

    ``attention``: the layers that make q, k, v, and their rows; ``split``: their outputs to heads; ``gate_up``: the
    layers that make gate and up, in this order, or the one that makes both.
    """

    config: Mapping[str, Any]
    heads: tuple[int, int]
    words: str
    layers: str
    norms: tuple[str, str]
    attention: tuple[str, ...]
    split: Callable[..., Heads]
    out: str
    gate_up: tuple[str, ...]
    down: str
    last: str
    head: str
    bias: bool = False


def _side_by_side(query: int, key_value: int, *made: torch.Tensor) -> Heads:
    """q | k | v, in one weight or in three."""
    joined = torch.cat(made, dim=-1).unflatten(-1, (-1, HEAD))
    q, k, v = joined.split([query, key_value, key_value], dim=-2)
    return q, k, v


def _by_group(query: int, key_value: int, made: torch.Tensor) -> Heads:
    """For each key-value head its query heads, its k, its v."""
    grouped = made.unflatten(-1, (key_value, query // key_value + 2, HEAD))
    return grouped[..., :-2, :].flatten(-3, -2), grouped[..., -2, :], grouped[..., -1, :]


REMOTE: Mapping[str, Remote] = {
    "qwen": Remote(
        {"num_attention_heads": 12, "kv_channels": HEAD, "intermediate_size": 2 * CHANNELS}, (12, 12),
        "transformer.wte", "transformer.h", ("ln_1", "ln_2"), ("attn.c_attn",), _side_by_side, "attn.c_proj",
        ("mlp.w2", "mlp.w1"), "mlp.c_proj", "transformer.ln_f", "lm_head", bias=True,
    ),
    "internlm2": Remote(
        {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": CHANNELS}, (12, 4),
        "model.tok_embeddings", "model.layers", ("attention_norm", "ffn_norm"), ("attention.wqkv",), _by_group,
        "attention.wo", ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2", "model.norm", "output",
    ),
    "baichuan": Remote(
        {"num_attention_heads": 12, "intermediate_size": CHANNELS}, (12, 12),
        "model.embed_tokens", "model.layers", ("input_layernorm", "post_attention_layernorm"), ("self_attn.W_pack",),
        _side_by_side, "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "model.norm", "lm_head",
    ),
    "chatglm": Remote(
        {
            "num_attention_heads": 8, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": HEAD,
            "ffn_hidden_size": CHANNELS,
        }, (8, 2),
        "transformer.embedding.word_embeddings", "transformer.encoder.layers",
        ("input_layernorm", "post_attention_layernorm"), ("self_attention.query_key_value",), _side_by_side,
        "self_attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "transformer.encoder.final_layernorm",
        "transformer.output_layer", bias=True,
    ),
    "exaone": Remote(
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": HEAD, "intermediate_size": CHANNELS}, (8, 2),
        "transformer.wte", "transformer.h", ("ln_1", "ln_2"),
        ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"), _side_by_side,
        "attn.attention.out_proj", ("mlp.c_fc_0", "mlp.c_fc_1"), "mlp.c_proj", "transformer.ln_f", "lm_head",
    ),
}  # fmt: skip


def config_of(model_type: str) -> dict[str, Any]:
    """config.json; where it does not tell the size of a head, hidden is heads x head size."""
    remote = REMOTE[model_type]
    hidden = HIDDEN if {"kv_channels", "head_dim"} & set(remote.config) else remote.heads[0] * HEAD
    return {"model_type": model_type, "hidden_size": hidden, "vocab_size": WORDS, **remote.config}


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """A layer at a dotted path, with plain modules on the way."""
    *way, last = path.split(".")
    for name in way:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    module.add_module(last, layer)


class Block(nn.Module):
    def __init__(self, remote: Remote, hidden: int) -> None:
        super().__init__()
        self.remote = remote
        query, key_value = remote.heads
        rows = [query, key_value, key_value] if len(remote.attention) == 3 else [query + 2 * key_value]
        for name in remote.norms:
            put(self, name, nn.RMSNorm(hidden))
        for name, count in zip(remote.attention, rows, strict=True):
            put(self, name, nn.Linear(hidden, count * HEAD, bias=remote.bias))
        put(self, remote.out, nn.Linear(query * HEAD, hidden, bias=False))
        for name in remote.gate_up:
            put(self, name, nn.Linear(hidden, CHANNELS * 2 // len(remote.gate_up), bias=False))
        put(self, remote.down, nn.Linear(CHANNELS, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        remote, layer = self.remote, self.get_submodule
        given = layer(remote.norms[0])(x)
        q, k, v = remote.split(*remote.heads, *(layer(name)(given) for name in remote.attention))
        k, v = (t.repeat_interleave(remote.heads[0] // remote.heads[1], dim=-2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(mask, -torch.inf).softmax(dim=-1)
        x = x + layer(remote.out)((scores @ v).transpose(1, 2).flatten(-2))
        given = layer(remote.norms[1])(x)
        gate, up = torch.cat([layer(name)(given) for name in remote.gate_up], dim=-1).chunk(2, dim=-1)
        further: torch.Tensor = x + layer(remote.down)(F.silu(gate) * up)
        return further


class RemoteModel(nn.Module):
    def __init__(self, model_type: str, hidden: int) -> None:
        super().__init__()
        self.remote = remote = REMOTE[model_type]
        put(self, remote.words, nn.Embedding(WORDS, hidden))
        put(self, remote.layers, nn.ModuleList(Block(remote, hidden) for _ in range(2)))
        put(self, remote.last, nn.RMSNorm(hidden))
        put(self, remote.head, nn.Linear(hidden, WORDS, bias=False))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.get_submodule(self.remote.words)(tokens)
        for block in self.get_submodule(self.remote.layers).children():
            x = block(x)
        words: torch.Tensor = self.get_submodule(self.remote.head)(self.get_submodule(self.remote.last)(x))
        return words


def build(config: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    return RemoteModel(config["model_type"], config["hidden_size"]), torch.randperm(WORDS)[:48].reshape(2, 24)
