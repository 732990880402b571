"""What each architecture's tensors mean, for the layout check: written down apart from the policies, on purpose.

A policy that is wrong in a way that can be undone merges back bit for bit. So the layout check must not learn from
it: here every cut axis is said again, in other words, as what its cells are: which head, which feed-forward channel,
which word. Sources: the architectures' published modelling code and configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tpshard.layout import Shape

Meaning = Literal["query", "key_value", "qkv", "channel", "gate_up", "word"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A kind of layer: what its cut axis counts, and which axis that is in the weight (in a bias it is axis 0, or
    there is none: ``consumer`` layers add their bias once)."""

    meaning: Meaning
    axis: int
    consumer: bool = False

    def axis_of(self, shape: Shape) -> int | None:
        if len(shape) >= 2:
            return self.axis
        return None if self.consumer or not shape else 0


_OUT, _IN = 0, 1

_LLAMA = {
    "embed_tokens": Slot("word", 0, consumer=True),
    "q_proj": Slot("query", _OUT),
    "k_proj": Slot("key_value", _OUT),
    "v_proj": Slot("key_value", _OUT),
    "o_proj": Slot("query", _IN, consumer=True),
    "gate_proj": Slot("channel", _OUT),
    "up_proj": Slot("channel", _OUT),
    "down_proj": Slot("channel", _IN, consumer=True),
    "lm_head": Slot("word", 0),
}
_PHI = {
    **_LLAMA,
    "self_attn.dense": Slot("query", _IN, consumer=True),
    "fc1": Slot("channel", _OUT),
    "fc2": Slot("channel", _IN, consumer=True),
}
_STARCODER2 = {**_LLAMA, "mlp.c_fc": Slot("channel", _OUT), "mlp.c_proj": Slot("channel", _IN, consumer=True)}
_PHI3 = {**_LLAMA, "qkv_proj": Slot("qkv", _OUT), "gate_up_proj": Slot("gate_up", _OUT)}
_GPT2 = {  # Conv1D: [in, out]
    "wte": Slot("word", 0, consumer=True),
    "attn.c_attn": Slot("qkv", 1),
    "attn.c_proj": Slot("query", 0, consumer=True),
    "mlp.c_fc": Slot("channel", 1),
    "mlp.c_proj": Slot("channel", 0, consumer=True),
    "lm_head": Slot("word", 0),
}
_BERT = {
    "word_embeddings": Slot("word", 0, consumer=True),
    "self.query": Slot("query", _OUT),
    "self.key": Slot("key_value", _OUT),
    "self.value": Slot("key_value", _OUT),
    "attention.output.dense": Slot("query", _IN, consumer=True),
    "intermediate.dense": Slot("channel", _OUT),
    "output.dense": Slot("channel", _IN, consumer=True),
    "predictions.decoder": Slot("word", 0),
    "predictions.bias": Slot("word", 0),
    "lm_head.decoder": Slot("word", 0),
    "lm_head.bias": Slot("word", 0),
    "generator_lm_head": Slot("word", 0),
}
_DISTILBERT = {
    "word_embeddings": Slot("word", 0, consumer=True),
    "q_lin": Slot("query", _OUT),
    "k_lin": Slot("key_value", _OUT),
    "v_lin": Slot("key_value", _OUT),
    "out_lin": Slot("query", _IN, consumer=True),
    "lin1": Slot("channel", _OUT),
    "lin2": Slot("channel", _IN, consumer=True),
    "vocab_projector": Slot("word", 0),
}
_ALBERT = {
    "word_embeddings": Slot("word", 0, consumer=True),
    "attention.query": Slot("query", _OUT),
    "attention.key": Slot("key_value", _OUT),
    "attention.value": Slot("key_value", _OUT),
    "attention.dense": Slot("query", _IN, consumer=True),
    "ffn": Slot("channel", _OUT),
    "ffn_output": Slot("channel", _IN, consumer=True),
    "predictions.decoder": Slot("word", 0),
    "predictions.bias": Slot("word", 0),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "stablelm"), _LLAMA
    ),
    **dict.fromkeys(("ministral", "smollm3", "olmo", "seed_oss", "helium"), _LLAMA),
    "phi": _PHI,
    "phi3": _PHI3,
    "starcoder2": _STARCODER2,
    "gpt2": _GPT2,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
}


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts and the size of one, from config.json. ``size`` is None where the config leaves it to shapes."""

    query: int
    key_value: int
    size: int | None


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """The attention heads that a config tells of, by the names in use; None where it tells nothing sound."""
    query = _first(config, "num_attention_heads", "n_head", "n_heads")
    if query is None:
        return None
    key_value = _first(config, "num_key_value_heads", "num_kv_heads") or query
    width = _first(config, "hidden_size", "n_embd", "dim", "d_model")
    size = _first(config, "head_dim") or (width // query if width and width % query == 0 else None)
    return Heads(query, key_value, size) if query % key_value == 0 else None


def slot_of(family: Mapping[str, Slot], tensor: str) -> Slot | None:
    """The slot of a tensor, by the longest name that ends its layer's path (or its own)."""
    layer = tensor.rpartition(".")[0]
    found = [name for name in family for path in (layer, tensor) if path == name or path.endswith("." + name)]
    return family[max(found, key=len)] if found else None


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
