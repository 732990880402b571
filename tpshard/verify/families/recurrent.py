"""State-space models, linear attention and short convolutions, and the attention that some of their layers have.

What mixes positions there is a block of its own beside attention and feed-forward: heads that are dealt, or single
channels; and groups that several heads share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.verify.families.decoders import LLAMA
from tpshard.verify.slots import IN, OUT, Slot


@dataclass(frozen=True, slots=True)
class Mixer:
    """``heads`` that are dealt (or channels), in ``groups``; ``widths``: for each part of an axis the cells of one
    head or group of it. A part that the heads of a group share is called a group."""

    heads: int
    groups: int
    widths: Mapping[str, int]

    def units_of(self, label: str) -> int:
        return self.groups if label.endswith("group") else self.heads


_MAMBA = {  # channels alone: what config.json calls intermediate_size
    **dict.fromkeys(("embeddings", "embedding"), Slot("word", 0, consumer=True)),
    "mixer.in_proj": Slot("gate_up", OUT),  # x | z
    "mixer.x_proj": Slot("channel", IN, consumer=True),
    "mixer.out_proj": Slot("channel", IN, consumer=True),
    **dict.fromkeys([f"mixer.{name}" for name in ("conv1d", "dt_proj", "A_log", "D")], Slot("channel", 0)),
    "lm_head": Slot("word", 0),
}
_JAMBA = {
    **LLAMA,
    "mamba.in_proj": Slot("mixer", OUT, mixer=("x channel", "z channel")),
    **dict.fromkeys(
        [f"mamba.{name}" for name in ("x_proj", "out_proj")], Slot("mixer", IN, True, mixer=("x channel",))
    ),
    **dict.fromkeys(
        [f"mamba.{name}" for name in ("conv1d", "dt_proj", "A_log", "D")], Slot("mixer", 0, mixer=("x channel",))
    ),
}


def _mamba2(module: str) -> dict[str, Slot]:
    return {
        f"{module}.in_proj": Slot("mixer", OUT, mixer=("z head", "x head", "B group", "C group", "dt head")),
        f"{module}.conv1d": Slot("mixer", 0, mixer=("x head", "B group", "C group")),
        **dict.fromkeys(
            [f"{module}.{name}" for name in ("A_log", "D", "dt_bias")], Slot("mixer", 0, mixer=("dt head",))
        ),
        f"{module}.norm": Slot("mixer", 0, mixer=("x head",), may_be_whole=True),  # over a group, or all
        f"{module}.out_proj": Slot("mixer", IN, consumer=True, mixer=("x head",)),
    }


_BAMBA = {**LLAMA, **_mamba2("mamba")}
_OLMO_HYBRID = {
    **LLAMA,
    "self_attn.q_norm": Slot("query", 0, all_of="q_proj"),
    "self_attn.k_norm": Slot("key_value", 0, all_of="k_proj"),
    **dict.fromkeys([f"linear_attn.{name}" for name in ("q_proj", "q_conv1d")], Slot("mixer", 0, mixer=("q group",))),
    **dict.fromkeys([f"linear_attn.{name}" for name in ("k_proj", "k_conv1d")], Slot("mixer", 0, mixer=("k group",))),
    **dict.fromkeys(
        [f"linear_attn.{name}" for name in ("v_proj", "v_conv1d", "g_proj")], Slot("mixer", 0, mixer=("v head",))
    ),
    **dict.fromkeys(
        [f"linear_attn.{name}" for name in ("a_proj", "b_proj", "A_log", "dt_bias")],
        Slot("mixer", 0, mixer=("decay head",)),
    ),
    "linear_attn.o_proj": Slot("mixer", IN, consumer=True, mixer=("v head",)),
}
_LFM2 = {
    **LLAMA,
    "conv.in_proj": Slot("mixer", OUT, mixer=("B channel", "C channel", "x channel")),
    "conv.conv": Slot("mixer", 0, mixer=("x channel",)),
    "conv.out_proj": Slot("mixer", IN, consumer=True, mixer=("x channel",)),
    "self_attn.out_proj": Slot("query", IN, consumer=True),
    "self_attn.gate_proj": Slot("query", OUT, row_per_head=True),
    "feed_forward.w1": Slot("channel", OUT),
    "feed_forward.w3": Slot("channel", OUT),
    "feed_forward.w2": Slot("channel", IN, consumer=True),
}
_QWEN_NEXT = {
    **LLAMA,
    "self_attn.q_proj": Slot("query", OUT, width=("head_dim", "head_dim")),  # by head: q, and the gate of its output
    "linear_attn.in_proj_qkvz": Slot("mixer", OUT, mixer=("q-k-v-z group",)),
    "linear_attn.in_proj_ba": Slot("mixer", OUT, mixer=("b-a group",)),
    **dict.fromkeys(
        [f"linear_attn.{name}" for name in ("in_proj_qkv", "conv1d")],
        Slot("mixer", 0, mixer=("q group", "k group", "v head")),
    ),
    "linear_attn.in_proj_z": Slot("mixer", OUT, mixer=("v head",)),
    **dict.fromkeys(
        [f"linear_attn.{name}" for name in ("in_proj_a", "in_proj_b", "A_log", "dt_bias")],
        Slot("mixer", 0, mixer=("decay head",)),
    ),
    "linear_attn.out_proj": Slot("mixer", IN, consumer=True, mixer=("v head",)),
    **{f"experts.#.{name}": Slot("channel", OUT, expert="routed") for name in ("gate_proj", "up_proj")},
    "experts.#.down_proj": Slot("channel", IN, consumer=True, expert="routed"),
    **{f"shared_expert.{name}": Slot("channel", OUT, expert="shared") for name in ("gate_proj", "up_proj")},
    "shared_expert.down_proj": Slot("channel", IN, consumer=True, expert="shared"),
}
_RWKV = {
    "embeddings": Slot("word", 0, consumer=True),
    **dict.fromkeys(
        [f"attention.{name}" for name in ("key", "value", "receptance", "time_decay", "time_first")],
        Slot("mixer", 0, mixer=("x channel",)),
    ),
    "attention.output": Slot("mixer", IN, consumer=True, mixer=("x channel",)),
    "feed_forward.key": Slot("channel", OUT),
    "feed_forward.value": Slot("channel", IN, consumer=True),
    "head": Slot("word", 0),
}
_XLSTM = {
    "embeddings": Slot("word", 0, consumer=True),
    **dict.fromkeys([f"mlstm_layer.{name}" for name in "qk"], Slot("mixer", 0, mixer=("q head",))),
    **dict.fromkeys(
        [f"mlstm_layer.{name}" for name in ("v", "ogate_preact", "multihead_norm")], Slot("mixer", 0, mixer=("v head",))
    ),
    **dict.fromkeys(
        [f"mlstm_layer.{name}" for name in ("igate_preact", "fgate_preact")], Slot("mixer", 0, mixer=("decay head",))
    ),
    "mlstm_layer.out_proj": Slot("mixer", IN, consumer=True, mixer=("v head",)),
    "ffn.proj_up": Slot("channel", OUT),
    "ffn.proj_up_gate": Slot("channel", OUT),
    "ffn.proj_down": Slot("channel", IN, consumer=True),
    "lm_head": Slot("word", 0),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), _MAMBA),
    "jamba": _JAMBA,
    "mamba2": {**_MAMBA, **_mamba2("mixer")},
    **dict.fromkeys(("bamba", "falcon_h1"), _BAMBA),
    "olmo_hybrid": _OLMO_HYBRID,
    **dict.fromkeys(("lfm2", "lfm3"), _LFM2),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _QWEN_NEXT),
    "rwkv": _RWKV,
    "xlstm": _XLSTM,
}
TIED_BY_DEFAULT = frozenset({"mamba", "falcon_mamba", "lfm2", "lfm3"})
HEAD_SIZE_BY_DEFAULT: Mapping[str, int] = {
    "lfm3": 128,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 256),
}


def mixer_of(config: Mapping[str, Any]) -> Mixer | None:
    """The mixer of a config; None where it has none or does not say enough."""
    try:
        match config.get("model_type"):
            case "jamba":
                return _channels(config["mamba_expand"] * config["hidden_size"])
            case "lfm2" | "lfm3":
                return _channels(config["hidden_size"])
            case "rwkv":
                return _channels(config.get("attention_hidden_size") or config["hidden_size"])
            case "xlstm":
                heads = config["num_heads"]
                width = config["hidden_size"]
                query, value = (int(width * config[key]) // heads for key in ("qk_dim_factor", "v_dim_factor"))
                return Mixer(heads, heads, {"q head": query, "v head": value, "decay head": 1})
            case "mamba2":
                inner = config["num_heads"] * config["head_dim"]
                return _states(config["num_heads"], inner, config["n_groups"], config["state_size"])
            case "bamba" | "falcon_h1":
                inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
                return _states(config["mamba_n_heads"], inner, config["mamba_n_groups"], config["mamba_d_state"])
            case "olmo_hybrid" | "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text":
                key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
                heads, groups = config["linear_num_value_heads"], config["linear_num_key_heads"]
                widths = {"q group": key, "k group": key, "v head": value, "decay head": 1}
                share = heads // groups  # of a group's heads: all of q, k, v, z, or b, a, stand together
                fused = {"q-k-v-z group": 2 * key + 2 * share * value, "b-a group": 2 * share}
                return Mixer(heads, groups, widths | fused)
            case _:
                return None
    except (KeyError, TypeError):
        return None


def _channels(count: int) -> Mixer:
    return Mixer(count, count, dict.fromkeys(("x channel", "z channel", "B channel", "C channel"), 1))


def _states(heads: int, inner: int, groups: int, state: int) -> Mixer:
    head = inner // heads
    return Mixer(heads, groups, {"z head": head, "x head": head, "B group": state, "C group": state, "dt head": 1})
