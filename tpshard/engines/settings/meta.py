"""Meta's params.json. It knows less than config.json: what it cannot say is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpshard.engines.joints import Joined
from tpshard.engines.settings.kind import Settings, Told
from tpshard.engines.settings.reading import DTYPES, agree, layers_in, real, shape_of, whole
from tpshard.engines.settings.rope import Rope, rope_keys, rope_of
from tpshard.errors import InputError, printable
from tpshard.folder import read_json
from tpshard.header import Entry

PARAMS = "params.json"
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# Constants of Meta's code, where params.json has a flag.
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# multiple_of and ffn_dim_multiplier of the models that Meta released.
RELEASED = ((256, None), (4096, 1.3), (1024, 1.3), (4096, 1.2), (256, 1.5), (256, 1.0))
LLAMA_3_WORDS = 128256


def channels(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Of the feed-forward, as Meta's code has it: cut to whole numbers twice, then rounded up.

    >>> channels(4096, 256, None), channels(4096, 1024, 1.3)
    (11008, 14336)
    """
    size = int(8 * dim / 3)
    size = size if multiplier is None else int(multiplier * size)
    return -(-size // multiple_of) * multiple_of


def rounding(dim: int, size: int) -> tuple[int, float | None]:
    """What makes ``size`` channels; half a channel more is cut off whatever the float's last bits are.

    >>> rounding(4096, 14336), channels(48, *rounding(48, 140))
    ((1024, 1.3), 140)
    """
    released = (pair for pair in RELEASED if channels(dim, *pair) == size)
    return next(released, (1, (size + 0.5) / int(8 * dim / 3)))


class Meta(Settings):
    own_files = (PARAMS,)

    def version(self, told: Told) -> str:
        """By how the embedding is cut, beside the head."""
        if len(told.ranks) == 1:
            return "of one rank"
        rows = [shape_of(told.ranks[0], name, 2, told.folder)[0] for name in (EMBEDDING, HEAD)]
        return "llama2" if rows[0] == rows[1] * len(told.ranks) else "llama3"

    def config(self, told: Told) -> dict[str, Any]:
        path = told.folder / PARAMS
        if not path.exists():
            return {}
        data = read_json(path)
        params = data.get("model", data)
        if not isinstance(params, dict):
            raise InputError(f"{path}: 'model' is no table")
        return _config(params, path, told.ranks)

    def files(self, joined: Joined) -> dict[str, bytes]:
        params = _params(joined.config, joined.engine.title, joined.family.variant == "llama3")
        return {PARAMS: (json.dumps(params) + "\n").encode()}


def _config(params: Mapping[str, Any], path: Path, ranks: Sequence[Mapping[str, Entry]]) -> dict[str, Any]:
    """config.json, after params.json was held against the tensors."""
    dim, layers, heads = (whole(params, key, path) for key in ("dim", "n_layers", "n_heads"))
    key_heads = whole(params, "n_kv_heads", path, heads)
    if dim % heads:
        raise InputError(f"{path}: 'dim' is {dim}, which does not go into {heads} heads")
    multiplier = params.get("ffn_dim_multiplier")
    multiplier = None if multiplier is None else real(params, "ffn_dim_multiplier", path)
    size = channels(dim, whole(params, "multiple_of", path, 256), multiplier)

    def rows(name: str, axis: int) -> int:
        return len(ranks) * shape_of(ranks[0], name, 2, path.parent)[axis]

    words = rows(HEAD, 0)
    agree(path, "dim", dim, shape_of(ranks[0], "norm.weight", 1, path.parent)[0], "norm.weight")
    agree(path, "n_layers", layers, layers_in(ranks, "layers."), "the layers' names")
    agree(path, "dim", dim, rows("layers.0.attention.wo.weight", 1), f"wo of {len(ranks)} ranks")
    agree(path, "n_kv_heads", key_heads, rows("layers.0.attention.wk.weight", 0) * heads // dim, "wk")
    agree(path, "hidden channels", size, rows("layers.0.feed_forward.w1.weight", 0), "w1")
    if params.get("vocab_size") not in (None, -1):  # Llama 1 and 2 left it to the tokenizer
        agree(path, "vocab_size", whole(params, "vocab_size", path), words, HEAD)
    theta = real(params, "rope_theta", path, 10000.0)
    scaled = params.get("use_scaled_rope", False)
    if scaled not in (True, False, None):
        raise InputError(f"{path}: 'use_scaled_rope' is {printable(repr(scaled), 40)}, not true or false")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": words,
        "rms_norm_eps": real(params, "norm_eps", path, 1e-5),
        "hidden_act": "silu",
        "max_position_embeddings": _positions(theta, bool(scaled)),
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES.get(ranks[0]["norm.weight"].dtype, "float32"),
        **rope_keys(Rope(theta, SCALED if scaled else None)),
        **({"bos_token_id": 128000, "eos_token_id": 128001} if words == LLAMA_3_WORDS else {}),
    }


def _positions(theta: float, scaled: bool) -> int:
    """Not in params.json: as the released models have it."""
    if scaled:
        return 131072
    return 8192 if theta >= 500000 else 16384 if theta > 10000 else 4096


def _params(config: Mapping[str, Any], title: str, llama3: bool) -> dict[str, Any]:
    """params.json. Raises InputError where it cannot say what config.json does."""
    path = Path("config.json")
    dim, heads = whole(config, "hidden_size", path), whole(config, "num_attention_heads", path)
    key_heads = whole(config, "num_key_value_heads", path, heads)
    head_dim, rope = whole(config, "head_dim", path, max(1, dim // heads)), rope_of(config)
    multiple_of, multiplier = rounding(dim, whole(config, "intermediate_size", path))

    def refuse(what: str) -> None:
        raise InputError(f"config.json: {what}, {title} has no word for it", hint="another engine may hold it")

    if head_dim * heads != dim:
        refuse(f"{heads} heads of {head_dim} cells are not the hidden size {dim}")
    if config.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is {printable(str(config['hidden_act']), 40)}")
    scaled = rope.scaling is not None
    if rope.scaling is not None and (not llama3 or any(rope.scaling.get(k) != v for k, v in SCALED.items())):
        shown = printable(json.dumps(dict(rope.scaling)))
        refuse(f"positions turn by {shown}" + (f", not {json.dumps(SCALED)}" if llama3 else ""))
    optional: dict[str, Any] = {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
    if llama3 or key_heads != heads:  # the code of Llama 1 and 2 refuses keys that it does not know
        optional["n_kv_heads"] = key_heads
    if llama3 or rope.theta != 10000:
        optional["rope_theta"] = rope.theta
    if scaled:
        optional["use_scaled_rope"] = True
    return {
        "dim": dim,
        "n_layers": whole(config, "num_hidden_layers", path),
        "n_heads": heads,
        "vocab_size": whole(config, "vocab_size", path),
        "multiple_of": multiple_of,
        "norm_eps": real(config, "rms_norm_eps", path, 1e-6),
        **optional,
    }
