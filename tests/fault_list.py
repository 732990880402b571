"""Every fault that is planted: what it is, into which models for how many ranks, who must catch it and name what.

Ids are those of the literature list that the project keeps: W wrong layouts that can be undone, Q quantised tensors,
R wrong bytes, M wrong manifests, policies and folders, E equivalents (must not alarm in the forward).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from tests import quantised_models
from tests.planting import (
    Arrays,
    Plant,
    blocks_exchanged,
    change_source,
    changed_after,
    columns_moved,
    dealt_by_rank,
    disguised,
    experts_dealt_in_turn,
    folder_fault,
    halves_to_pairs,
    inside_heads,
    last_rank_takes_more,
    layout_fault,
    like_a_column,
    modulo_heads,
    overlapping_row,
    policy_fault,
    remainder_lost,
    reverse,
    rows_moved,
    same,
    source_fault,
    split_rightly,
)
from tests.tampering import Folder
from tpshard.convert import plan_split
from tpshard.errors import InputError, PolicyError
from tpshard.layout import Layout
from tpshard.roles import Role
from tpshard.verify.request import Level, Request
from tpshard.verify.run import verify


@dataclass(frozen=True)
class Fault:
    """``plant`` makes the wrong shard folder; ``named`` must stand in a finding of one of the checks ``caught_by``.

    ``against``: whether the source is at hand for verify. ``level``: the deepest check to run (None: all). ``usual``:
    planted by the test suite, too; the others only by ``python -m tests.faults``.
    """

    id: str
    what: str
    model: str
    tp: int
    plant: Plant
    caught_by: frozenset[str]
    named: str
    against: bool = True
    level: Level | None = None
    usual: bool = True


@dataclass(frozen=True)
class Equivalent:
    """Shards that compute what the source does. ``failing``: the checks that must fail, and no other may."""

    id: str
    what: str
    model: str
    tp: int
    plant: Plant
    failing: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Refusal:
    """What cannot be planted: ``attempt`` must raise an error of this class that says ``named``."""

    id: str
    what: str
    attempt: Callable[[Path, Path], object]
    error: type[Exception]
    named: str


MODEL = frozenset({"layout", "forward"})
LAYOUT = frozenset({"layout"})  # the forward computes the same, rightly
FORWARD = frozenset({"forward"})  # rows and columns are in place; what is done with them is not
BYTES = frozenset({"weights", "forward"})
WEIGHTS = frozenset({"weights"})
FILES = frozenset({"files"})

# ---------------------------------------------------------------------------------------------- names and places

_LLAMA = {
    "q": "layers.#.self_attn.q_proj", "k": "layers.#.self_attn.k_proj", "v": "layers.#.self_attn.v_proj",
    "o": "layers.#.self_attn.o_proj", "gate": "layers.#.mlp.gate_proj", "up": "layers.#.mlp.up_proj",
    "down": "layers.#.mlp.down_proj", "norm": "layers.#.input_layernorm", "words": "embed_tokens", "head": "lm_head",
    "q_norm": "layers.#.self_attn.q_norm", "layer": "layers.#", "dims": "oi",
}  # fmt: skip
_FUSED = {"qkv": "layers.#.self_attn.qkv_proj", "gate_up": "layers.#.mlp.gate_up_proj"}
_GPT2 = {
    "qkv": "h.#.attn.c_attn", "q": "h.#.attn.c_attn", "o": "h.#.attn.c_proj", "up": "h.#.mlp.c_fc",
    "down": "h.#.mlp.c_proj", "norm": "h.#.ln_2", "words": "wte", "layer": "h.#", "dims": "io",
}  # fmt: skip
_BERT = {
    "q": "layer.#.attention.self.query", "k": "layer.#.attention.self.key", "v": "layer.#.attention.self.value",
    "o": "layer.#.attention.output.dense", "up": "layer.#.intermediate.dense", "down": "layer.#.output.dense",
    "norm": "layer.#.attention.output.LayerNorm", "words": "word_embeddings", "layer": "layer.#", "dims": "oi",
}  # fmt: skip
NAMES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "granite", "cohere", "stablelm"), _LLAMA),
    "phi3": _LLAMA | _FUSED | {"q": _FUSED["qkv"]},
    "glm4": _LLAMA | {"gate_up": _FUSED["gate_up"]},
    **dict.fromkeys(("olmo2", "olmo3"), _LLAMA | {"norm": "layers.#.post_attention_layernorm"}),
    "phi": _LLAMA | {"o": "layers.#.self_attn.dense", "up": "layers.#.mlp.fc1", "down": "layers.#.mlp.fc2"},
    "starcoder2": _LLAMA | {"up": "layers.#.mlp.c_fc", "down": "layers.#.mlp.c_proj"},
    "gpt2": _GPT2,
    "bert": _BERT,
    **dict.fromkeys(("mixtral", "granitemoe", "gpt_oss", "deepseek_v3"), _LLAMA),  # but for the feed-forward
}


def named(model: str, text: str, layer: str = "0") -> str:
    """``$o`` and the like as this model calls them."""
    names = NAMES[model.partition("/")[0]]
    return Template(text).substitute({key: name.replace("#", layer) for key, name in names.items()})


def places(text: str) -> Iterator[tuple[str, int, bool]]:
    """``qwen2@2 llama/k3@3`` as models and ranks. The first is planted by the test suite, too; so is what has a +."""
    for number, place in enumerate(text.split()):
        model, _, tp = place.partition("@")
        yield model, int(tp.rstrip("+")), number == 0 or tp.endswith("+")


# ---------------------------------------------------------------------------------------------- W, by policy

ATTENTION = "qwen2@2 llama@2 llama/k3@3 qwen3/h8@4 phi3@2 olmo2/k3@3 cohere@2 starcoder2@2 phi/k3@3 gpt2@2 gpt2@6 bert@3+ bert/h8@4"
FEED_FORWARD = (
    "qwen2@2 llama/k3@3 qwen3/h8@4 phi3@2 phi3@6 olmo2@2 cohere/k3@3 starcoder2@6 glm4@2 gpt2@2+ gpt2@3 bert@3+ bert@6"
)

WRONG_POLICIES = [
    ("W01", "q, k, v cut into equal blocks", "$qkv: {rule: column, dims: $dims}", MODEL, "$qkv", "gpt2@2 phi3@2+ gpt2@3 gpt2/h8@4 gpt2@6 phi3/k3@3 phi3/h8@4"),
    ("W02", "q, k, v cut as if fused by head", "$qkv: {rule: column, dims: io, heads: H}", MODEL, "$qkv", "gpt2@3 gpt2@2 gpt2@6 gpt2/h8@4"),
    ("W03", "q, k, v cut as if fused by group", "$qkv: {rule: column, heads: K}", MODEL, "$qkv", "phi3@2 phi3/k3@3"),
    ("W07", "gate | up cut into equal blocks", "$gate_up: column", MODEL, "$gate_up", "phi3@2 glm4@2 phi3/k3@3 phi3/h8@4 phi3@6 glm4/k3@3"),
    ("W09", "gate | up cut as if interleaved", "$gate_up: {rule: column, unit: 2}", MODEL, "$gate_up", "phi3@2 glm4@2 phi3/h8@4"),
    ("W12", "key-value heads cut inside", '"{$k,$v}": column', MODEL, "$k", "qwen2@6 llama@6 cohere@6 qwen3/h8@4 gemma2@6"),
    ("W13", "size of a head guessed", "$q: {rule: column, unit: 5}\n$o: {rule: row, unit: 5}", MODEL, "$q", "qwen2@4 llama@4 qwen3@4"),
    ("W21", "bias of q, k, v cut apart from its weight", "$qkv.bias: column", MODEL, "$qkv", "gpt2@2 gpt2@3 gpt2@6"),
    ("W22", "attention output cut as a column", "$o: {rule: column, dims: $dims}", MODEL, "$o", ATTENTION),
    ("W23", "query cut as a row", "$q: {rule: row, dims: $dims}", LAYOUT, "$q", "qwen2@2 bert@2+ llama/k3@3 gpt2@3 phi3@2 bert/h8@4"),
    ("W24", "first Conv1D taken for a Linear", "$up: column", MODEL, "$up", "gpt2@2 gpt2@3 gpt2@6"),
    ("W24", "second Conv1D taken for a Linear", "$down: row", MODEL, "$down", "gpt2@2 gpt2@3 gpt2@6"),
    ("W24", "square Conv1D taken for a Linear", "$o: {rule: row, heads: H}", MODEL, "$o", "gpt2@2 gpt2@3 gpt2/h8@4"),
    ("W25", "feed-forward output whole, its input cut", "$down: replicate", MODEL, "$down", FEED_FORWARD),
    ("W25", "attention output whole, its input cut", "$o: replicate", MODEL, "$o", "gpt2@2 qwen2@2 llama/k3@3 bert@6 phi3@6 cohere@2"),
    ("W27", "feed-forward output a column, no gather", "$down: {rule: column, dims: $dims}", MODEL, "$down", FEED_FORWARD),
    ("W28", "norm over hidden cut", "$norm: column", MODEL, "$norm", "qwen2@2 bert@2+ gpt2@2+ llama/k3@3 olmo2@2 cohere@6 gemma2@2 phi3@2 phi/k3@3 starcoder2@2"),
    ("W29", "norm over all heads, q and k not gathered", "$q: {rule: column, heads: H}\n$k: {rule: column, heads: K}", FORWARD, "layers.0.self_attn", "olmo2@2 olmo2/k3@3 olmo2@6 olmo3@2"),
    ("W31", "norm of a head cut inside it", "$q_norm: column", MODEL, "$q_norm", "qwen3@2 qwen3/k3@3 qwen3/h8@4"),
    ("W33", "norms of each head whole, its heads cut", "$q_norm: replicate", LAYOUT, "$q_norm", "cohere@2 cohere/k3@3 cohere@6"),
    ("W44", "words cut on hidden, not gathered", "$words: {rule: column, dims: io}", MODEL, "$words", "qwen2@2 bert@2+ gpt2@3 llama/k3@3 gemma2@2 cohere@2"),
    ("W46", "output head not gathered", "$head: column", FORWARD, "$head", "qwen2@2 llama/k3@3 phi3@6 qwen3/h8@4"),
    ("W48", "stacked gate | up of experts cut into equal blocks", "block_sparse_moe.input_linear: {rule: column, dims: eoi}", MODEL, "input_linear", "granitemoe@2 granitemoe@4"),
    ("W48", "stacked gate | up of experts cut as if in turn", "block_sparse_moe.input_linear: {rule: column, dims: eoi, unit: 2}", MODEL, "input_linear", "granitemoe@2 granitemoe@4"),
    ("W48", "gate and up of experts in turn, cut as halves", "mlp.experts.{gate_up_proj,gate_up_proj_bias}: {rule: column, dims: eio, parts: 2}", MODEL, "experts.gate_up_proj", "gpt_oss@2 gpt_oss@4"),
    ("W48", "gate and up of experts in turn, cut inside a pair", "mlp.experts.{gate_up_proj,gate_up_proj_bias}: {rule: column, dims: eio, unit: 1, uneven: true}", MODEL, "experts.gate_up_proj", "gpt_oss@8"),
    ("W48", "experts' way down cut on its out axis", "mlp.experts.{down_proj,down_proj_bias}: {rule: column, dims: eio}", MODEL, "experts.down_proj", "gpt_oss@2 gpt_oss@4"),
    ("W48", "experts' way down cut on its out axis", "block_sparse_moe.output_linear: {rule: column, dims: eoi}", MODEL, "output_linear", "granitemoe@2"),
    ("W48", "one expert whole, its siblings cut", "experts.1.{w1,w2,w3}: replicate", MODEL, "experts.1.w1", "mixtral@2 mixtral@8"),
    ("W48", "one expert whole, its siblings cut", "mlp.experts.3.{gate_proj,up_proj,down_proj}: replicate", MODEL, "experts.3.gate_proj", "deepseek_v3@2 deepseek_v3@3"),
    ("W48", "one expert's channels dealt otherwise", "experts.1.{w1,w3}: {rule: column, parts: 2, uneven: true}\nexperts.1.w2: {rule: row, parts: 2, uneven: true}", LAYOUT, "experts.1.w1", "mixtral@2 mixtral@4"),
    ("W51", "router split by experts", "block_sparse_moe.gate: column", MODEL, "block_sparse_moe.gate", "mixtral@2 mixtral@4"),
    ("W51", "router split by experts", "mlp.router: column", MODEL, "mlp.router", "gpt_oss@2"),
    ("W51", "router split by experts", "block_sparse_moe.router.layer: column", MODEL, "router.layer", "granitemoe@4"),
    ("W51", "router and its correction split by experts", "mlp.gate: column", MODEL, "mlp.gate", "deepseek_v3@2 deepseek_v3@4"),
    ("W51", "router's correction split, all zero", "mlp.gate.e_score_correction_bias: column", frozenset({"layout", "generic"}), "e_score_correction_bias", "deepseek_v3@2 deepseek_v3@3"),
    ("W53", "up from the latent cut as keys | values", "self_attn.kv_b_proj: {rule: column, parts: [[H, qk_nope_head_dim], [H, v_head_dim]]}", MODEL, "kv_b_proj", "deepseek_v3@2 deepseek_v3@3 deepseek_v3@4"),
    ("W54", "way down to the latent split", "self_attn.kv_a_proj_with_mqa: column", MODEL, "kv_a_proj_with_mqa", "deepseek_v3@2 deepseek_v3@3"),
    ("W54", "way down to the queries' latent split", "self_attn.q_a_proj: column", MODEL, "q_a_proj", "deepseek_v3@2 deepseek_v3@4"),
    ("W33", "sinks of all heads whole, the heads cut", "self_attn.sinks: replicate", LAYOUT, "self_attn.sinks", "gpt_oss@2 gpt_oss@8"),
    ("M18", "policy changed to match wrong shards", "$qkv: {rule: column, dims: $dims}", MODEL, "$qkv", "phi3@2 gpt2@3"),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- W, by layout

WRONG_LAYOUTS: list[tuple[str, str, str, Callable[[Layout], Layout], Role | None, frozenset[str], str]] = [
    ("W11", "key-value heads dealt modulo", "$v", modulo_heads, None, MODEL, "qwen2@6 llama@6 qwen3/h8@4 cohere@6"),
    ("W15", "attention output in reverse rank order", "$o.weight", reverse, None, MODEL, ATTENTION),
    ("W16", "feed-forward output in reverse rank order", "$down.weight", reverse, None, MODEL, FEED_FORWARD),
    ("W17", "everything in reverse rank order", "", reverse, None, LAYOUT, "qwen2@2 gpt2@3 bert@6 phi3/h8@4"),
    ("W18", "bias of attention added by every rank", "$o.bias", same, Role("replicate"), FORWARD, "bert@2 gpt2@2 gpt2@3 starcoder2@6 phi@2 bert/h8@4"),
    ("W18", "bias of the feed-forward added by every rank", "$down.bias", same, Role("replicate"), FORWARD, "gpt2@2 bert@3 starcoder2@2 phi/k3@3"),
    ("W20", "bias of a row layer cut as a column's", "$down.bias", like_a_column, None, LAYOUT, "bert@2 gpt2@3 starcoder2@2"),
    ("W21", "bias of q in another rank's order", "$q.bias", reverse, None, MODEL, "qwen2@2 bert@3 starcoder2@6 phi@2"),
    ("W31", "norm of each head cut inside it", "$q_norm", inside_heads, None, MODEL, "cohere@2 cohere/k3@3"),
    ("W41", "vocabulary dealt by another rounding", "$words", last_rank_takes_more, None, LAYOUT, "qwen2@2 gpt2@2 bert@6 llama/k3@3"),
    ("W63", "no sum after attention", "$o.weight", same, Role("replicate"), FORWARD, "qwen2@2 llama/k3@3 phi3@6 gpt2@2 bert@3 cohere@2"),
    ("W63", "no sum after the feed-forward", "$down.weight", same, Role("replicate"), FORWARD, "gpt2@2 llama/k3@3 bert@3 glm4@2"),
    ("W15", "sinks in reverse rank order", "self_attn.sinks", reverse, None, MODEL, "gpt_oss@2 gpt_oss@8"),
    ("W16", "experts' way down in reverse rank order", "experts.3.w2.weight", reverse, None, MODEL, "mixtral@2 mixtral@8"),
    ("W18", "bias of experts added by every rank", "experts.down_proj_bias", same, Role("replicate"), FORWARD, "gpt_oss@2"),
    ("R08", "what does not divide is lost", "$words", remainder_lost, None, frozenset({"weights", "layout"}), "qwen2@2 gpt2@2 bert@6"),
    ("R09", "one word on two ranks", "$words", overlapping_row, None, frozenset({"weights", "layout"}), "qwen2@2 gpt2@2 bert@2"),
    ("R09", "one channel on two ranks", "$up.weight", overlapping_row, None, LAYOUT, "qwen2@2 bert@2"),
]  # fmt: skip


def wrong_layouts() -> Iterator[Fault]:
    for id_, what, rules, caught, name, where in WRONG_POLICIES:
        for model, tp, usual in places(where):
            plant = policy_fault(named(model, rules, "*"))
            if id_ == "M18":
                plant = disguised(plant)
            yield Fault(id_, what, model, tp, plant, caught, named(model, name), usual=usual)
    for id_, what, part, change, role, caught, where in WRONG_LAYOUTS:
        for model, tp, usual in places(where):
            part_of_name = named(model, part)
            plant = layout_fault(part_of_name, change, role)
            layer = re.sub(r"\.(weight|bias|down_proj_bias)$", "", part_of_name)  # where it is the module's own
            yield Fault(id_, what, model, tp, plant, caught, layer, usual=usual)


# ---------------------------------------------------------------------------------------------- W, R: another source


def _halves(arrays: Arrays) -> None:
    """Matrices to bfloat16 and back, by cutting their bits."""
    for name in arrays:
        if arrays[name].ndim == 2:
            arrays[name] = (arrays[name].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _exchange(arrays: Arrays, one: str, other: str) -> None:
    for name in [name for name in arrays if one in name]:
        twin = name.replace(one, other)
        arrays[name], arrays[twin] = arrays[twin], arrays[name]


def _transpose(arrays: Arrays, part: str) -> None:
    for name in [name for name in arrays if part in name and arrays[name].ndim == 2]:
        assert arrays[name].shape[0] == arrays[name].shape[1], name
        arrays[name] = np.ascontiguousarray(arrays[name].T)


def _turned(arrays: Arrays, part: str, turn: Callable[[np.ndarray], np.ndarray]) -> None:
    """Stacks of matrices, and of their biases, in another order."""
    for name in [name for name in arrays if part in name]:
        arrays[name] = np.ascontiguousarray(turn(arrays[name]))


OTHER_SOURCES: list[tuple[str, str, Callable[[Arrays], object], str, str]] = [
    ("W05", "k and v exchanged in q | k | v", columns_moved("c_attn", blocks_exchanged(1, 2, 3)), "$qkv", "gpt2@2 gpt2@3"),
    ("W05", "k and v exchanged", lambda a: _exchange(a, "self.key", "self.value"), "$k", "bert@2 bert@6"),
    ("W06", "source has each rank's q, k, v in turn", columns_moved("c_attn", dealt_by_rank(3, 2)), "$qkv", "gpt2@2 gpt2@3"),
    ("W08", "gate and up exchanged", rows_moved({"gate_up_proj": blocks_exchanged(0, 1, 2)}), "$gate_up", "phi3@2 glm4/k3@3"),
    ("W08", "gate and up exchanged", lambda a: _exchange(a, "gate_proj", "up_proj"), "$gate", "llama@2 qwen2@6"),
    ("W49", "gate and up of experts exchanged", lambda a: _exchange(a, ".w1.", ".w3."), "block_sparse_moe", "mixtral@2 mixtral@8"),
    ("W49", "gate and up of one expert exchanged", lambda a: _exchange(a, "experts.3.gate_proj", "experts.3.up_proj"), "mlp.experts", "deepseek_v3@2"),
    ("W49", "gate and up of stacked experts exchanged", lambda a: _turned(a, "input_linear", lambda w: np.roll(w, 52, axis=1)), "block_sparse_moe", "granitemoe@2"),
    ("W49", "gate and up of stacked experts exchanged", lambda a: _turned(a, "gate_up_proj", lambda w: w[..., np.arange(104) ^ 1]), "mlp.experts", "gpt_oss@2 gpt_oss@4"),
    ("W50", "experts transposed, as many channels as hidden", lambda a: _transpose(a, ".w2."), "block_sparse_moe", "mixtral/square@2"),
    ("W50", "stacked experts transposed, as many channels as hidden", lambda a: _turned(a, "output_linear", lambda w: w.swapaxes(1, 2)), "block_sparse_moe", "granitemoe/square@2"),
    ("R11", "two experts exchanged", lambda a: _exchange(a, "experts.1.", "experts.4."), "block_sparse_moe", "mixtral@2"),
    ("R11", "two experts of a stack exchanged", lambda a: _turned(a, "down_proj", lambda w: w[[0, 4, 2, 3, 1]]), "mlp.experts", "gpt_oss@2"),
    ("W34", "rotary pairs in Meta's order", rows_moved({"q_proj": halves_to_pairs, "k_proj": halves_to_pairs}), "$q", "llama@2 qwen2@6 qwen3/h8@4"),
    ("W36", "v in Meta's rotary order, too", rows_moved({"v_proj": halves_to_pairs}), "$v", "llama@2 qwen2@6"),
    ("W37", "whole heads permuted, partly rotated", rows_moved({"q_proj": halves_to_pairs, "k_proj": halves_to_pairs}), "$q", "phi@2 stablelm/k3@3"),
    ("R06", "rounded to half of its bits and back", _halves, "$up", "qwen2@2 gpt2@3 bert@2"),
    ("R16", "square matrix transposed", lambda a: _transpose(a, "attention.self.query"), "$q", "bert@2 bert@3"),
    ("R16", "square matrix transposed", lambda a: _transpose(a, "attn.c_proj"), "$o", "gpt2@2 gpt2@6"),
]  # fmt: skip


def other_sources() -> Iterator[Fault]:
    for id_, what, change, name, where in OTHER_SOURCES:
        for model, tp, usual in places(where):
            yield Fault(id_, what, model, tp, source_fault(change), BYTES, named(model, name), usual=usual)
    for model, tp, usual in places("qwen2@2 gpt2@3 bert@6"):
        later = changed_after(_halves)
        up = named(model, "$up")
        yield Fault("M14", "source changed after the split", model, tp, later, BYTES, up, usual=usual)


# ---------------------------------------------------------------------------------------------- R

WRONG_BYTES: list[tuple[str, str, Callable[[Folder, str, str, str], object], str, str]] = [
    ("R01", "one mantissa bit flipped", lambda f, q, norm, layer: f.flip_bit(q, 1, 40), "$q", "weights"),
    ("R03", "a number became NaN", lambda f, q, norm, layer: f.set_bytes(norm, 1, 0, b"\x01\x00\xc0\x7f"), "$norm", "weights"),
    ("R04", "dtype F32 became F64", lambda f, q, norm, layer: f.cast(q, "F64"), "$q", "weights"),
    ("R05", "dtype F32 became F16", lambda f, q, norm, layer: f.cast(q, "F16"), "$q", "weights"),
    ("R07", "every rank has rank 0's rows", lambda f, q, norm, layer: f.copy_rank(q, 0, 1), "$q", "weights"),
    ("R11", "two layers' tensors exchanged", lambda f, q, norm, layer: f.exchange(q, q.replace(".0.", ".2.")), "$q", "weights"),
    ("W61", "two layers exchanged by name", lambda f, q, norm, layer: f.rename_layers(layer, layer.replace("0", "2")), "$layer", "weights"),
    ("R12", "rank files exchanged", lambda f, q, norm, layer: f.exchange_files(0, 1), "rank-0000", "files"),
    ("R13", "tensor missing from all ranks", lambda f, q, norm, layer: f.drop(q), "$q", "weights"),
    ("R13", "tensor missing from one rank", lambda f, q, norm, layer: f.drop_from_rank(q, 1), "$q", "files"),
    ("R14", "tensor extra in one rank", lambda f, q, norm, layer: f.add_to_rank("extra.weight", 1), "extra.weight", "files"),
    ("R15", "shape turned round, same bytes", lambda f, q, norm, layer: f.turn_shape(q, 0), "$q", "files"),
    ("R17", "a rank's tensor is zeros", lambda f, q, norm, layer: f.fill(q, 1, 0), "$q", "weights"),
    ("R17", "a rank's tensor is random", lambda f, q, norm, layer: f.randomise(q, 1), "$q", "weights"),
    ("R18", "a replica differs", lambda f, q, norm, layer: f.flip_bit(norm, 1, 3), "$norm", "weights"),
    ("R20", "big-endian bytes", lambda f, q, norm, layer: f.swap_bytes(q, 0), "$q", "weights"),
]  # fmt: skip


def wrong_bytes() -> Iterator[Fault]:
    """Each twice: as an accident (digests tell), and resealed, so that only the source or other ranks can tell."""
    for model, tp, usual in places("qwen2@2 phi3@6 gpt2@2 bert@2 cohere/k3@3 llama/h8@4"):
        layer = named(model, "$layer")
        for id_, what, change, name, check in WRONG_BYTES:

            def hit(
                folder: Folder, change: Callable[..., object] = change, model: str = model, layer: str = layer
            ) -> None:
                change(folder, folder.find(named(model, "$q.weight")), folder.find(named(model, "$norm.weight")), layer)

            said = named(model, name)
            accident, resealed = folder_fault(hit, reseal=False), folder_fault(hit, reseal=True)
            yield Fault(id_, what, model, tp, accident, FILES, "", against=False, level="weights", usual=usual)
            yield Fault(id_, f"{what}, resealed", model, tp, resealed, frozenset({check}), said, usual=usual)
        for what, cut in (("file shorter by a byte", Folder.truncate), ("the tail is zeros", Folder.zero_tail)):
            plant = folder_fault(lambda f, cut=cut: cut(f, 1), reseal=False)  # type: ignore[misc]
            yield Fault("R22", what, model, tp, plant, FILES, "rank-00001", level="files", usual=usual)
    scalar = folder_fault(lambda f: f.drop("h.0.attn.masked_bias"), reseal=True)
    yield Fault("R21", "scalar dropped, resealed", "gpt2/buffers", 2, scalar, WEIGHTS, "h.0.attn.masked_bias")


# ---------------------------------------------------------------------------------------------- M, and config.json

WRONG_FOLDERS: list[tuple[str, str, Callable[[Folder], object], bool, str]] = [
    ("W05", "runs recorded in another order", lambda f: f.edit(lambda m: _turn_runs(m)), True, "tpshard.json"),
    ("M01", "manifest edited", lambda f: f.edit(lambda m: m["tensors"][0].update(part=0, source=0, dtype="F16")), False, "tpshard.json"),
    ("M02", "a file of another rank lies there", lambda f: f.write("rank-00002-of-00004.safetensors"), False, "rank-00002-of-00004"),
    ("M03", "a rank's file is missing", lambda f: f.remove(1), False, "rank-00001"),
    ("M03", "a rank is listed twice", lambda f: f.edit(lambda m: m["files"].append(m["files"][0])), True, "tpshard.json"),
    ("M04", "a stale shard of an older run", lambda f: f.write("old/rank-00000-of-00002.safetensors"), False, "old/rank"),
    ("M05", "manifest names a file that is not there", lambda f: f.edit(lambda m: m["files"][0].update(name="x.safetensors")), True, "x.safetensors"),
    ("M07", "a file's size is wrong", lambda f: f.edit(lambda m: m["files"][0].update(size=1), seal=True), False, "rank-00000"),
    ("M13", "a key stands twice in the manifest", lambda f: f.prefix_manifest('{"ranks": 4,'), False, "tpshard.json"),
    ("M16", "manifest says that it is verified", lambda f: f.edit(lambda m: m.update(verified=True)), False, "tpshard.json"),
    ("M17", "a file with a temporary name is left", lambda f: f.write(".rank-00001-of-00002.safetensors.tmp"), False, ".tmp"),
    ("M19", "a newer version", lambda f: f.edit(lambda m: m.update(version=2)), True, "tpshard.json"),
    ("M20", "config of another model", lambda f: f.edit_config(num_attention_heads=4), False, "config.json"),
    ("M21", "manifest lists no tensors", lambda f: f.edit(lambda m: m.update(tensors=[])), True, "tpshard.json"),
    ("M22", "rank is -1", lambda f: f.edit(lambda m: m["files"][0].update(rank=-1)), True, "tpshard.json"),
    ("M23", "a path with ..", lambda f: f.edit(lambda m: m["files"][0].update(name="../x.safetensors")), True, "tpshard.json"),
    ("M24", "carried file changed", lambda f: f.write("config.json", "{}"), False, "config.json"),
]  # fmt: skip


def _turn_runs(manifest: dict[str, object]) -> None:
    """The first layout whose axis has several runs: in descending order."""
    for layout in manifest["layouts"]:  # type: ignore[attr-defined]
        for shard in layout["shards"]:
            for axis, runs in shard["spans"].items():
                if len(runs) > 1:
                    shard["spans"][axis] = runs[::-1]
                    return
    raise AssertionError("no layout has several runs")


CONFIGS: list[tuple[str, str, dict[str, object], frozenset[str], str, str]] = [
    ("W38", "config field changed, resealed", {"rope_theta": 500.0}, WEIGHTS, "config.json", "qwen2@2"),
    ("W38", "norm's epsilon lost, resealed", {"rms_norm_eps": None}, WEIGHTS, "config.json", "llama@2 qwen2@6"),
    ("W38", "softcap lost, resealed", {"final_logit_softcapping": None}, WEIGHTS, "config.json", "gemma2@2"),
    ("W38", "multiplier lost, resealed", {"residual_multiplier": None}, WEIGHTS, "config.json", "granite@2"),
    ("W39", "heads of config divided by the ranks, resealed", {"num_attention_heads": 3, "num_key_value_heads": 1}, frozenset({"weights", "layout"}), "q_proj", "qwen2@2 llama@2 cohere@2"),
    ("W40", "scale of attention from another size, resealed", {"query_pre_attn_scalar": 22}, WEIGHTS, "config.json", "gemma2@2"),
    ("W45", "tied flag changed, resealed", {"tie_word_embeddings": True}, WEIGHTS, "config.json", "qwen2@2"),
    ("W45", "tied flag lost, no head on disk, resealed", {"tie_word_embeddings": False}, frozenset({"weights", "layout"}), "lm_head missing and tie_word_embeddings false", "gemma2@2 gpt2@3 cohere@2"),
    ("M20", "config of another model, resealed", {"num_attention_heads": 12, "head_dim": 5}, frozenset({"weights", "layout"}), "k_proj", "qwen2@2 qwen3@2"),
]  # fmt: skip


def wrong_folders() -> Iterator[Fault]:
    for id_, what, change, reseal, said in WRONG_FOLDERS:
        model = "phi3" if id_ == "W05" else "qwen2"
        yield Fault(id_, what, model, 2, folder_fault(change, reseal), FILES, said, level="weights")
    for id_, what, fields, caught, said, where in CONFIGS:
        for model, tp, usual in places(where):
            plant = folder_fault(lambda f, fields=fields: f.edit_config(**fields), reseal=True)  # type: ignore[misc]
            yield Fault(id_, what, model, tp, plant, caught, said, usual=usual)


def hidden_by_the_weights() -> Iterator[Fault]:
    """Real weights that are alike or zero hide the fault from the forward; generic weights do not."""
    alike = layout_fault("layers.0.self_attn.", lambda w: modulo_heads(w) if w.shape[0] == 20 else w)
    yield Fault(
        "E05",
        "modulo, and all key-value heads equal",
        "llama/equal",
        6,
        alike,
        frozenset({"layout", "generic"}),
        "self_attn.k_proj",
    )
    for model, tp, usual in places("bert/zero@2 gpt2/zero@3"):
        doubled = layout_fault(named(model, "$o.bias"), same, Role("replicate"))
        yield Fault(
            "E06",
            "bias added by every rank, all biases zero",
            model,
            tp,
            doubled,
            frozenset({"generic"}),
            named(model, "$o"),
            usual=usual,
        )


def wrong_groups() -> Iterator[Fault]:
    what, said = "experts dealt to groups in turn, not in runs", "expert 1 of 6 is on ranks 2-3"
    yield Fault("W47", what, "mixtral/six", 2, experts_dealt_in_turn, LAYOUT, said)


def all_faults() -> list[Fault]:
    from tests.quantised_faults import quantised

    return [
        *wrong_layouts(),
        *wrong_groups(),
        *other_sources(),
        *wrong_bytes(),
        *wrong_folders(),
        *hidden_by_the_weights(),
        *quantised(),
    ]


# ---------------------------------------------------------------------------------------------- E


def _channels(folder: Folder, model: str) -> None:
    """Every rank's channels of the first feed-forward in reverse, in all of its layers alike."""
    paths = [NAMES[model][part].replace("#", "0") for part in ("gate", "up", "gate_up") if part in NAMES[model]]
    producers = [name for path in paths for leaf in ("weight", "bias") if (name := folder.held(f"{path}.{leaf}"))]
    io = NAMES[model]["dims"] == "io"

    def turned(array: np.ndarray, axis: int, blocks: int = 1) -> np.ndarray:
        return np.concatenate([np.flip(block, axis) for block in np.split(array, blocks, axis)], axis)

    for rank in folder.ranks:
        for name in producers:
            axis, blocks = (-1 if io else 0), (2 if "gate_up" in name else 1)
            folder.rearrange(name, rank, lambda a, axis=axis, blocks=blocks: turned(a, axis, blocks))  # type: ignore[misc]
        folder.rearrange(folder.find(named(model, "$down.weight")), rank, lambda a: turned(a, 0 if io else 1))


def _first_heads(folder: Folder, model: str) -> None:
    """The first two query heads of rank 0, which share a key-value head, change places."""
    swapped = [*range(10, 20), *range(10)]
    q, o = folder.find(named(model, "$q.weight")), folder.find(named(model, "$o.weight"))
    folder.rearrange(q, 0, lambda a: np.concatenate([a[swapped], a[20:]]))
    if bias := folder.held(q.removesuffix("weight") + "bias"):
        folder.rearrange(bias, 0, lambda a: np.concatenate([a[swapped], a[20:]]))
    if model == "cohere":
        folder.rearrange(folder.find(named(model, "$q_norm.weight")), 0, lambda a: a[[1, 0, *range(2, len(a))]])
    folder.rearrange(o, 0, lambda a: np.concatenate([a[:, swapped], a[:, 20:]], axis=1))


def _groups(folder: Folder, model: str) -> None:
    """The first and the last rank exchange all their heads, and the attention output's columns with them."""
    attention = named(model, "$o").rpartition(".")[0].removesuffix(".output")
    for name in folder.names(attention):
        if folder.is_cut(name):
            folder.exchange_ranks(name, 0, folder.ranks[-1])


def _signs(folder: Folder, model: str) -> None:
    """Rank 0's first key-value head and its query heads: one rotary pair of each negated."""
    head, pair = (11, [4]) if model == "bert" else (10, [2, 7])

    def negated(array: np.ndarray) -> np.ndarray:
        rows = array.copy()
        for first in range(0, len(rows), head):
            rows[[first + row for row in pair]] *= -1
        return rows

    for part in ("$q", "$k"):
        for leaf in (".weight", ".bias"):
            if name := folder.held(named(model, part) + leaf):
                folder.rearrange(name, 0, negated)


MOVED: list[tuple[str, str, Callable[[Folder, str], None], str]] = [
    ("E01", "channels permuted alike in up, gate and down", _channels, "qwen2@2 llama@3 phi3@2 gpt2@3 bert@6"),
    ("E02", "query heads permuted within a group", _first_heads, "qwen2@2 llama@2 phi3@2 cohere@2"),
    ("E03", "key-value groups moved between ranks", _groups, "qwen2@2 phi3@2 gpt2@2 bert@3 cohere@2"),
    ("E04", "a pair of q and k rows negated", _signs, "qwen2@2 llama@2 bert@3"),
]  # fmt: skip
PADDED = "$head: {rule: column, gather: true, pad: 64}"


def equivalents() -> Iterator[Equivalent]:
    for id_, what, change, where in MOVED:
        for model, tp, _ in places(where.replace("llama@3", "llama/k3@3")):
            kind = model.partition("/")[0]
            plant = folder_fault(lambda f, change=change, kind=kind: change(f, kind), reseal=True)  # type: ignore[misc]
            yield Equivalent(id_, what, model, tp, plant, WEIGHTS)
    for model, tp, _ in places("qwen2@2 gpt2@3 bert@6"):
        turned = layout_fault("", reverse)
        yield Equivalent("E07", "partial sums added up in reverse rank order", model, tp, turned, LAYOUT)
    for pad in (64, 128):
        for model, tp, _ in places("qwen2@2 llama/k3@3"):
            padded = policy_fault(named(model, PADDED).replace("64", str(pad)))
            yield Equivalent("E08", f"output head padded to a multiple of {pad}, recorded", model, tp, padded)
    longer = folder_fault(lambda f: f.pad_rows("lm_head.weight", 5), reseal=True)
    yield Equivalent("E08", "output head padded, not recorded", "qwen2", 2, longer, FILES)


CLEAN = "mixtral@2 granitemoe@2 gpt_oss@4 deepseek_v3@3 qwen2@1 qwen2@2 qwen2@6 llama/k3@3 llama/h8@4 qwen3@2 phi3@2 phi3/k3@3 gpt2@2 gpt2@3 gpt2/h8@4 bert@2 bert@6 olmo2@2 olmo2@6 cohere@2 cohere/k3@3 gemma2@2 glm4@2 starcoder2/k3@3 phi@2 stablelm@6 granite@2"  # fmt: skip
USUALLY_CLEAN = {"qwen2@1", "qwen2@2", "qwen2@6", "qwen3@2", "phi3@2", "gpt2@2", "gpt2@3", "bert@2", "bert@6"}


def clean() -> Iterator[tuple[Equivalent, bool]]:
    for place in CLEAN.split():
        ((model, tp, _),) = places(place)
        yield Equivalent("", "as split writes it", model, tp, split_rightly), place in USUALLY_CLEAN


# ---------------------------------------------------------------------------------------------- what is refused


def _split_by(text: str) -> Callable[[Path, Path], object]:
    def attempt(source: Path, scratch: Path) -> None:
        (scratch / "policy.yaml").write_text(text)
        conversion = plan_split(source, scratch / "shards", 2, str(scratch / "policy.yaml"))
        if conversion.warnings:  # --strict: an error
            raise PolicyError("\n".join(conversion.warnings))

    return attempt


def _split_changed(config: dict[str, object], change: Callable[[Arrays], object]) -> Callable[[Path, Path], object]:
    def attempt(source: Path, scratch: Path) -> None:
        other = scratch / "changed"
        shutil.copytree(source, other)
        change_source(other, change)
        path = other / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        plan_split(other, scratch / "shards", 2)

    return attempt


def _split_quantised(form: str, rules: str) -> Callable[[Path, Path], object]:
    """Split a tiny llama with heads of 20 in a format, by the built-in policy but for some rules."""

    def attempt(source: Path, scratch: Path) -> None:
        quantised_models.save(form, scratch / "model", head_dim=20)
        (scratch / "own.yaml").write_text("name: own\nextends: llama\nrules:\n  rotary_emb: replicate\n" + rules)
        plan_split(scratch / "model", scratch / "shards", 2, str(scratch / "own.yaml"))

    return attempt


def _without_manifest(source: Path, scratch: Path) -> None:
    split_rightly(source, scratch / "shards", 2)
    (scratch / "shards/tpshard.json").unlink()
    verify(Request(scratch / "shards", against=source, workers=1))


WRONG = "name: wrong\nextends: llama\nrules:\n"
REFUSALS = [
    Refusal("M08", "two rules for one tensor", _split_by(WRONG + "  mlp.down_proj: row\n  layers.*.mlp.down_proj: column\n"), PolicyError, "down_proj"),
    Refusal("M10", "a tensor without a rule", _split_by("name: wrong\nrules:\n  mlp.down_proj: row\n"), PolicyError, "embed_tokens"),
    Refusal("M11", "a rule without a tensor", _split_by(WRONG + "  mlp.sideways_proj: row\n"), PolicyError, "mlp.sideways_proj"),
    Refusal("M12", "a number that YAML reads otherwise", _split_by(WRONG + "  lm_head: {rule: column, gather: true, pad: 0100}\n"), PolicyError, "0100"),
    Refusal("M13", "a key stands twice in the policy", _split_by(WRONG + "  mlp.down_proj: row\n  mlp.down_proj: column\n"), PolicyError, "mlp.down_proj"),
    Refusal("M19", "an unknown key in the policy", _split_by("name: wrong\nextends: llama\nreplicas: 2\n"), PolicyError, "replicas"),
    Refusal("M17", "output without its manifest", _without_manifest, InputError, "tpshard.json"),
    Refusal("Q15", "quantised by nobody knows what, says config.json", _split_changed({"quantization_config": {"quant_method": "aqlm"}}, lambda a: None), InputError, "quantised (aqlm)"),
    Refusal("Q16", "quantised, say the tensors' names alone", _split_changed({}, lambda a: a.update({"model.layers.0.mlp.up_proj.scales": np.ones(4, np.float32)})), InputError, "scales"),
    Refusal("Q04", "a cut inside a group of inputs (heads of 20, groups of 16)", _split_quantised("compressed int4", ""), PolicyError, "inside the quantised block 32 to 48"),
    Refusal("Q05", "a cut inside a packed word (heads of 20, words of 8)", _split_quantised("awq", "  self_attn.o_proj: replicate\n"), PolicyError, "inside the quantised block 16 to 24"),
]  # fmt: skip

NOT_PLANTED = {
    "W32": "ALiBi slopes are computed by the engine and stored nowhere; no built-in policy is for such a model",
    "W43": "what an engine does with the logits of padded rows is not in the shards; that padding is zero is checked",
    "W55": "no checkpoint fuses the ways down to the two latents; engines do, when they load",
    "W56 to W60": "need policies for Mamba",
    "W64": "is planted into adapters, which have tests of their own (tests/test_lora.py)",
    "W65": "needs policies for models of text and images",
    "Q12": "swizzled scales stand in no checkpoint: engines make them when they load",
}
