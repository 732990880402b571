"""What a layer is likely to be, by its name: query or output projection, up or down, embedding or head.

Guesses only. Who drafts a policy by them tries them on shapes, and where it can on the model itself.
"""

from __future__ import annotations

import re
from typing import Literal

Part = Literal[
    "q", "k", "v", "qkv", "kv", "latent", "out", "up", "down", "router", "words", "positions", "head", "other"
]

_ATTENTION = re.compile(r"att(n|ention)?(_|$|\d)|attn|attention|mha|crossatt|selfatt", re.IGNORECASE)
_Q = frozenset({"q", "query", "wq", "queries", "querys"})
_K = frozenset({"k", "key", "wk", "keys"})
_V = frozenset({"v", "value", "wv", "values"})
_FUSED = frozenset({"qkv", "wqkv", "querykeyvalue", "cattn", "inproj", "wpack", "qkvproj", "projqkv"})
_KV = frozenset({"kv", "wkv", "keyvalue", "kvproj"})
_OUT = frozenset(
    {"o", "out", "output", "dense", "proj", "wo", "oproj", "outproj", "outlin", "cproj", "projection", "summary"}
)
_UP = frozenset(
    {
        "up", "gate", "fc1", "w1", "w3", "wi", "lin1", "linear1", "fcin", "cfc", "intermediate", "expand", "densehto4h",
        "in", "input", "layer1", "dense1", "v1", "fc",
    }
)  # fmt: skip
_DOWN = frozenset(
    {
        "down",
        "fc2",
        "w2",
        "wo",
        "lin2",
        "linear2",
        "fcout",
        "contract",
        "dense4htoh",
        "layer2",
        "dense2",
        "cproj",
        "output",
    }
)
_WORDS = re.compile(r"emb|wte|word|tok|shared|lookup", re.IGNORECASE)
_POSITIONS = re.compile(r"pos|wpe|type|segment|lang|rel", re.IGNORECASE)
_HEAD = re.compile(r"head|lm_|logits|decoder|predictions|embed_out|output_embed|vocab|generator|proj", re.IGNORECASE)


def segments(path: str) -> list[str]:
    """The words of a path, without the numbers of layers.

    >>> segments("decoder.block.*.layer.*.SelfAttention.q")
    ['decoder', 'block', 'layer', 'SelfAttention', 'q']
    """
    return [segment for segment in path.split(".") if segment != "*" and not segment.isdigit()]


def tokens(segment: str) -> set[str]:
    """The words of a segment, and all of it without its lines.

    >>> sorted(tokens("q_proj")), sorted(tokens("kSelfLin"))
    (['proj', 'q', 'qproj'], ['k', 'kselflin', 'lin', 'self'])
    """
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*(?=_|[A-Z]|$|\d)|\d+", segment)
    return {part.lower() for part in parts} | {segment.replace("_", "").lower()}


def in_attention(path: str) -> bool:
    """Whether a layer stands in an attention, by the names above it."""
    return any(_ATTENTION.search(segment) for segment in segments(path)[:-1])


def part_of(path: str) -> Part:
    """What a layer with a matrix is likely to be.

    >>> [part_of(f"h.*.attn.{name}") for name in ("c_attn", "c_proj", "k_proj", "query_key_value")]
    ['qkv', 'out', 'k', 'qkv']
    >>> part_of("layer.*.attention.output.dense"), part_of("layer.*.output.dense"), part_of("layer.*.ffn.lin1")
    ('out', 'down', 'up')
    """
    names = segments(path)
    leaf = tokens(names[-1]) if names else set()
    above = tokens(names[-2]) if len(names) > 1 else set()
    attention = in_attention(path)
    fused = _of_attention(leaf, names[-1] if names else "", attention)
    if fused is not None:
        return fused
    if attention and (leaf & _OUT or above & {"output", "out"}):
        return "out"
    if leaf & {"router"} or (leaf & {"gate"} and not leaf & {"up", "proj", "gateproj", "linear", "fc"}):
        return "router"
    if leaf & _DOWN or (leaf & {"dense", "output"} and above & {"output"}):
        return "down"
    if leaf & _UP or above & {"intermediate"}:
        return "up"
    return "other"


def _of_attention(leaf: set[str], name: str, attention: bool) -> Part | None:
    """q, k and v of any spelling; the low-rank halves of latent attention are told by their ``a``."""
    lowrank = {"a", "down"} & leaf and leaf & (_Q | _KV | _K | _V)
    if lowrank and ("_a" in name or "down" in name):
        return "latent"
    if leaf & _FUSED and (attention or leaf & {"qkv", "wqkv", "querykeyvalue"}):
        return "qkv"
    if leaf & _KV and not leaf & _Q:
        return "kv"
    if {"query", "key", "value"} <= leaf:
        return "qkv"
    for part, words in (("q", _Q), ("k", _K), ("v", _V)):
        if leaf & words or (attention and leaf & {f"{part}proj", f"lin{part}", f"linear{part}", f"to{part}"}):
            return part  # type: ignore[return-value]
    return None


def is_words(path: str) -> bool:
    """Whether a table is one of words rather than of positions or types."""
    name = ".".join(segments(path)[-2:])
    return bool(_WORDS.search(name)) and not _POSITIONS.search(segments(path)[-1])


def is_head(path: str) -> bool:
    """Whether a layer with an output for each word predicts words."""
    return bool(_HEAD.search(".".join(segments(path)[-2:])))


def is_norm_of_heads(path: str) -> bool:
    """Whether a norm is one of queries or keys.

    >>> is_norm_of_heads("layers.*.self_attn.q_norm"), is_norm_of_heads("layer.*.attention.output.LayerNorm")
    (True, False)
    """
    words = tokens(segments(path)[-1])
    return bool(words & (_Q | _K)) and any("norm" in word or word == "ln" for word in words)
