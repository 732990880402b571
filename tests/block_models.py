"""Small models for the engine: nets with blocks, and transformers' own with cuts by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tests.in_memory import Cut, evenly
from tests.tiny_models import make_config

TOKENS = torch.arange(0, 100, 2).reshape(2, 25)
WIDE = 14
MADE: list[tuple[int, weakref.ref[torch.Tensor]]] = []  # a block's number, and something that it made


class Block(nn.Module):
    """A norm, a column layer and a row layer; ``scale`` belongs to nobody's layer."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number = number
        self.norm, self.up, self.down = nn.LayerNorm(WIDE), nn.Linear(WIDE, 33), nn.Linear(33, WIDE)
        self.scale = nn.Parameter(torch.ones(WIDE))

    def forward(self, x: torch.Tensor) -> Any:
        middle = torch.tanh(self.up(self.norm(x)))
        MADE.append((self.number, weakref.ref(middle)))
        return x * self.scale + self.down(middle)


class Net(nn.Module):
    block: Callable[[int], nn.Module] = Block
    count = 4

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(101, WIDE)
        self.blocks = nn.ModuleList(type(self).block(number) for number in range(self.count))
        self.norm, self.head = nn.LayerNorm(WIDE), nn.Linear(WIDE, 9, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = self.onwards(x, block)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def onwards(self, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        return block(x)  # type: ignore[no-any-return]


def cuts_of(module: nn.Module, ranks: int) -> dict[str, Cut]:
    """By the names that all nets here have."""
    cuts = {}
    for name, value in module.state_dict().items():
        if name.endswith((".up.weight", ".up.bias")):
            cuts[name] = evenly("column", 0, len(value), ranks)
        elif name.endswith("down.weight"):
            cuts[name] = evenly("row", 1, value.shape[1], ranks)
        elif name in ("words.weight",):
            cuts[name] = evenly("row", 0, len(value), ranks)
        elif name == "head.weight":
            cuts[name] = evenly("column", 0, len(value), ranks, gather="output")
    return cuts


# ------------------------------------------------------------------------------------------ of transformers


def of_llama(module: nn.Module, ranks: int) -> dict[str, Cut]:
    """Six query heads of 10; each of three key-value heads belongs to two ranks."""
    cuts = {}
    for name, value in module.state_dict().items():
        if "q_proj" in name or "gate_proj" in name or "up_proj" in name:
            cuts[name] = evenly("column", 0, len(value), ranks)
        elif "k_proj" in name or "v_proj" in name:
            runs = [(10 * (3 * r // ranks), 10 * (3 * r // ranks) + 10) for r in range(ranks)]
            cuts[name] = Cut("column", 0, runs)
        elif "o_proj" in name or "down_proj" in name:
            cuts[name] = evenly("row", 1, value.shape[1], ranks)
        elif "embed" in name:
            cuts[name] = evenly("row", 0, len(value), ranks)
        elif "lm_head" in name:
            cuts[name] = evenly("column", 0, len(value), ranks, gather="output")
    return cuts


def of_albert(module: nn.Module, ranks: int) -> dict[str, Cut]:
    cuts = {}
    for name, value in module.state_dict().items():
        if any(part in name for part in ("query", "key", "value", "ffn.")):
            cuts[name] = evenly("column", 0, len(value), ranks)
        elif name.endswith(("attention.dense.weight", "ffn_output.weight")):
            cuts[name] = evenly("row", 1, value.shape[1], ranks)
    return cuts


def of_t5(module: nn.Module, ranks: int) -> dict[str, Cut]:
    cuts = {}
    for name, value in module.state_dict().items():
        if name.endswith((".q.weight", ".k.weight", ".v.weight", ".wi.weight")):
            cuts[name] = evenly("column", 0, len(value), ranks)
        elif name.endswith((".o.weight", ".wo.weight")):
            cuts[name] = evenly("row", 1, value.shape[1], ranks)
    return cuts


def llama() -> nn.Module:
    config = make_config("llama", 3, tie_word_embeddings=False, attn_implementation="eager", pad_token_id=None)
    return transformers.LlamaForCausalLM(config)


def albert() -> nn.Module:
    return transformers.AlbertModel(make_config("albert", attn_implementation="eager"), add_pooling_layer=False)


def t5() -> nn.Module:
    sizes = {"vocab_size": 103, "d_model": 26, "d_kv": 10, "d_ff": 36, "num_layers": 3, "num_heads": 6}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_decoder_layers=2, relative_attention_num_buckets=8)
    )
