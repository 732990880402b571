"""nanotron's model_config.json: the model's config.json for transformers, and where parts of joined tensors begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, printable
from tpshard.folder import read_json
from tpshard.layout import Shape

CONFIG = "model_config.json"
_SAME = (
    "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, slots=True)
class Theirs:
    """``config``: as transformers has it; ``interleaved``: whether the two halves of each head of Q and K are rows in
    turn."""

    config: Mapping[str, Any]
    interleaved: bool

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)


def hf_config(folder: Path) -> Theirs:
    """Raises InputError where the model is no Llama."""
    path = folder / CONFIG
    theirs = read_json(path)
    for key in _NEEDED:
        if type(theirs.get(key)) is not int or theirs[key] < 1:
            raise InputError(f"{path}: {key} is {printable(str(theirs.get(key)), 40)}, not a number from 1")
    if theirs.get("is_llama_config") is False or any(theirs.get(key) for key in ("moe_config", "is_qwen2_config")):
        raise InputError(f"{path}: is of another model than Llama, whose names are not known")
    config = {key: theirs[key] for key in _SAME if key in theirs}
    made = {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return Theirs(made, theirs.get("rope_interleaved") is True)


def rows_of(theirs: Theirs, parts: Sequence[str], joined: Shape) -> list[tuple[int, int, int]]:
    """First and last row of each part in the joined tensor, and the rows of a head whose halves are in turn (0: rows
    are in order). Raises InputError where the parts do not fill it."""
    units = [theirs.heads, theirs.kv_heads, theirs.kv_heads] if len(parts) == 3 else [1] * len(parts)
    rows = joined[0] if joined else 0
    if rows % sum(units):
        what = f"{printable(parts[0])}: {rows} joined rows are not {'+'.join(map(str, units))} equal shares"
        raise InputError(what, hint=f"is {CONFIG} this model's?")
    unit, begin, found = rows // sum(units), 0, []
    for count, part in zip(units, parts, strict=True):
        turned = theirs.interleaved and len(parts) == 3 and part != parts[2]
        if turned and unit % 2:
            raise InputError(f"{printable(part)}: heads of {unit} rows have no two halves")
        found.append((begin, begin + count * unit, unit if turned else 0))
        begin += count * unit
    return found
