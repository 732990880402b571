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

Meaning = Literal["query", "key_value", "qkv", "kv", "channel", "gate_up", "word", "head_cell"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A kind of layer: what its cut axis counts, and which axis that is in the weight (in a bias it is axis 0, or
    there is none: ``consumer`` layers add their bias once).

    ``row_per_head``: the axis has one row for a head, not one for each cell of it. ``all_of``: the layer works on all
    heads together, so it is whole, and so must be the output of the layer named. ``cross``: the heads are those of
    cross-attention, a block of its own beside the layer's self-attention.
    """

    meaning: Meaning
    axis: int
    consumer: bool = False
    row_per_head: bool = False
    all_of: str = ""
    cross: bool = False

    def axis_of(self, shape: Shape) -> int | None:
        if len(shape) >= 2:
            return self.axis
        return None if self.consumer or not shape else 0

    @property
    def must_be_whole(self) -> bool:
        return bool(self.all_of) or self.meaning == "head_cell"


_OUT, _IN = 0, 1
_INSIDE_A_HEAD = Slot("head_cell", 0)  # [head size], the same for all heads

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
    **dict.fromkeys(("q_norm", "k_norm", "query_layernorm", "key_layernorm"), _INSIDE_A_HEAD),
}
_COHERE = {  # one module over [heads, head size]: the weight has a row for each head
    **_LLAMA,
    "q_norm": Slot("query", 0, row_per_head=True),
    "k_norm": Slot("key_value", 0, row_per_head=True),
}
_OLMO2 = {  # q_norm(q_proj(x)), before the heads are told apart: the root mean square is over all of them
    **_LLAMA,
    "q_norm": Slot("query", 0, all_of="q_proj"),
    "k_norm": Slot("key_value", 0, all_of="k_proj"),
}
_PHI = {
    **_LLAMA,
    "self_attn.dense": Slot("query", _IN, consumer=True),
    "fc1": Slot("channel", _OUT),
    "fc2": Slot("channel", _IN, consumer=True),
    **dict.fromkeys(("q_layernorm", "k_layernorm"), _INSIDE_A_HEAD),
}
_STARCODER2 = {**_LLAMA, "mlp.c_fc": Slot("channel", _OUT), "mlp.c_proj": Slot("channel", _IN, consumer=True)}
_GLM = {**_LLAMA, "gate_up_proj": Slot("gate_up", _OUT)}
_PHI3 = {**_GLM, "qkv_proj": Slot("qkv", _OUT)}
_GPT2 = {  # Conv1D: [in, out]
    "wte": Slot("word", 0, consumer=True),
    "attn.c_attn": Slot("qkv", 1),
    "attn.c_proj": Slot("query", 0, consumer=True),
    "crossattention.q_attn": Slot("query", 1, cross=True),
    "crossattention.c_attn": Slot("kv", 1, cross=True),
    "crossattention.c_proj": Slot("query", 0, consumer=True, cross=True),
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
    "crossattention.self.query": Slot("query", _OUT, cross=True),
    "crossattention.self.key": Slot("key_value", _OUT, cross=True),
    "crossattention.self.value": Slot("key_value", _OUT, cross=True),
    "crossattention.output.dense": Slot("query", _IN, consumer=True, cross=True),
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
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "cwm", "seed_oss"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "vaultgemma", "granite", "helium", "stablelm"), _LLAMA),
    **dict.fromkeys(("smollm3", "olmo", "ernie4_5", "exaone4", "hunyuan_v1_dense"), _LLAMA),
    **dict.fromkeys(("arcee", "jais2", "nemotron"), _LLAMA),  # without gate_proj
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
    **dict.fromkeys(("olmo2", "olmo3"), _OLMO2),
    **dict.fromkeys(("glm", "glm4"), _GLM),
    "phi": _PHI,
    "phi3": _PHI3,
    "starcoder2": _STARCODER2,
    "gpt2": _GPT2,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra"), _BERT),
    **dict.fromkeys(("data2vec-text", "ernie", "roberta-prelayernorm"), _BERT),
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
}

# What the architecture's config class says where config.json is silent.
TIED_BY_DEFAULT: frozenset[str] = frozenset(
    {
        "albert", "bert", "camembert", "cohere", "cohere2", "data2vec-text", "distilbert", "electra", "ernie",
        "ernie4_5", "gemma", "gemma2", "gemma3_text", "gpt2", "roberta", "roberta-prelayernorm", "smollm3",
        "starcoder2", "vaultgemma", "xlm-roberta", "xlm-roberta-xl",
    }
)  # fmt: skip
_HEAD_SIZE_BY_DEFAULT: Mapping[str, int] = {  # elsewhere hidden size / heads
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "vaultgemma"), 256),
    **dict.fromkeys(("cwm", "ernie4_5", "glm", "glm4", "helium", "ministral3", "qwen3", "seed_oss"), 128),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of heads, channels and words, and the cells of one head, from config.json. None: it does not say."""

    query: int
    key_value: int
    head: int | None = None
    channels: int | None = None
    words: int | None = None

    def of(self, unit: str) -> int | None:
        return self.channels if unit == "channel" else self.words


def sizes_of(config: Mapping[str, Any]) -> Sizes | None:
    """What a config tells of its model's sizes, by the names in use; None where it tells of no heads."""
    query = _first(config, "num_attention_heads", "n_head", "n_heads")
    if query is None:
        return None
    width = _first(config, "hidden_size", "n_embd", "dim", "d_model")
    by_default = _HEAD_SIZE_BY_DEFAULT.get(str(config.get("model_type")))
    return Sizes(
        query=query,
        key_value=_first(config, "num_key_value_heads", "num_kv_heads") or query,
        head=_first(config, "head_dim") or by_default or (width // query if width and width % query == 0 else None),
        channels=_first(config, "intermediate_size", "n_inner", "hidden_dim"),
        words=_first(config, "vocab_size"),
    )


def are_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding, by config.json or else by the architecture's own default."""
    said = config.get("tie_word_embeddings")
    return said if isinstance(said, bool) else config.get("model_type") in TIED_BY_DEFAULT


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
