"""TensorRT-LLM's config.json, in the place of the model's own."""

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
from tpshard.folder import CONFIG, read_json
from tpshard.header import Entry
from tpshard.mesh import Mesh

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MixtralForCausalLM": "mixtral"}
EMBEDDING = "transformer.vocab_embedding.weight"
RENORMALIZE = 1  # of moe.normalization_mode: the chosen experts' shares add up to one


class TensorRT(Settings):
    own_files = (CONFIG,)

    def mesh(self, folder: Path) -> Mesh:
        path, mapping = _read(folder)[:2]
        mesh = Mesh(tp=whole(mapping, "tp_size", path, 1), pp=whole(mapping, "pp_size", path, 1))
        for key, size in (("cp_size", 1), ("moe_ep_size", 1)):
            if (has := whole(mapping, key, path, size)) > size:
                raise InputError(f"{path}: '{key}' is {has}, only {size} is read", hint="convert it with less")
        agree(path, "world_size", whole(mapping, "world_size", path, mesh.ranks), mesh.ranks, "tp_size and pp_size")
        return mesh

    def config(self, told: Told) -> dict[str, Any]:
        path, mapping, data = _read(told.folder)
        for key in ("quant_algo", "kv_cache_quant_algo"):
            if (data.get("quantization") or {}).get(key) is not None:
                raise InputError(f"{path}: '{key}' is set, quantised files of TensorRT-LLM are not read")
        if data.get("use_parallel_embedding"):
            raise InputError(f"{path}: 'use_parallel_embedding' is set, a cut embedding is not read")
        tp = whole(mapping, "tp_size", path, 1)
        stages = [told.ranks[first : first + tp] for first in range(0, len(told.ranks), tp)]
        return _config(data, path, stages)

    def files(self, joined: Joined) -> dict[str, bytes]:
        return {CONFIG: (json.dumps(_their_config(joined), indent=4) + "\n").encode()}


def _read(folder: Path) -> tuple[Path, Mapping[str, Any], Mapping[str, Any]]:
    """Where it is, its mapping, and all of it."""
    path = folder / CONFIG
    data = read_json(path)
    mapping = data.get("mapping")
    if not isinstance(mapping, dict) or "architecture" not in data:
        raise InputError(f"{path}: is not TensorRT-LLM's, which has 'architecture' and 'mapping'")
    return path, mapping, data


def _config(data: Mapping[str, Any], path: Path, stages: Sequence[Sequence[Mapping[str, Entry]]]) -> dict[str, Any]:
    """The model's config.json, after theirs was held against the tensors."""
    model_type = ARCHITECTURES.get(str(data["architecture"]))
    if model_type is None:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{path}: architecture {printable(str(data['architecture']), 40)} is not known ({known} are)")
    sizes = _sizes(data, path, stages)
    scaling = data.get("rotary_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise InputError(f"{path}: 'rotary_scaling' is {printable(repr(scaling), 40)}, not a table")
    rope = rope_of({"rope_theta": real(data, "rotary_base", path, 10000.0), "rope_scaling": scaling})
    out = {
        "architectures": [data["architecture"]],
        "model_type": model_type,
        **sizes,
        "intermediate_size": whole(data, "intermediate_size", path),
        "rms_norm_eps": real(data, "norm_epsilon", path, 1e-5),
        "hidden_act": "silu",
        "max_position_embeddings": whole(data, "max_position_embeddings", path),
        "tie_word_embeddings": bool(data.get("tie_word_embeddings", False)),
        "torch_dtype": str(data.get("dtype", "float16")),
        **rope_keys(Rope(*rope)),
    }
    if model_type == "llama":
        return out | {"attention_bias": "transformer.layers.0.attention.qkv.bias" in stages[0][0]}
    moe: Any = data.get("moe")
    moe = moe if isinstance(moe, dict) else {}
    return out | {
        "num_local_experts": whole(moe, "num_experts", path),
        "num_experts_per_tok": whole(moe, "top_k", path),
    }


def _sizes(data: Mapping[str, Any], path: Path, stages: Sequence[Sequence[Mapping[str, Entry]]]) -> dict[str, int]:
    """Held against the tensors. Raises InputError where the two say different things."""
    first, tp = stages[0][0], len(stages[0])
    hidden, layers, heads = (whole(data, key, path) for key in _SIZES)
    key_heads = whole(data, "num_key_value_heads", path, heads)
    size = whole(data, "head_size", path, max(1, hidden // heads))
    words, width = shape_of(first, EMBEDDING, 2, path.parent)
    agree(path, "vocab_size", whole(data, "vocab_size", path), words, EMBEDDING)
    agree(path, "hidden_size", hidden, width, EMBEDDING)
    found = sum(layers_in(stage, "transformer.layers.") for stage in stages)
    agree(path, "num_hidden_layers", layers, found, "the layers' names")
    dense = shape_of(first, "transformer.layers.0.attention.dense.weight", 2, path.parent)[1]
    agree(path, "num_attention_heads", heads, dense * tp // size, "attention.dense")
    rows = shape_of(first, "transformer.layers.0.attention.qkv.weight", 2, path.parent)[0]
    held = max(key_heads, tp)  # where there are fewer heads than ranks, each rank has one
    agree(path, "num_key_value_heads", held, (rows // size - heads // tp) // 2 * tp, "attention.qkv")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": size,
        "vocab_size": words,
    }


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def _mapping(mesh: Mesh) -> dict[str, int]:
    return {
        "world_size": mesh.ranks,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": mesh.tp,
        "pp_size": mesh.pp,
        "moe_tp_size": mesh.tp,
        "moe_ep_size": 1,
    }


def _their_config(joined: Joined) -> dict[str, Any]:
    config, path = joined.config, Path(CONFIG)
    hidden, layers, heads = (whole(config, key, path) for key in _SIZES)
    rope = rope_of(config)
    model_type = str(config.get("model_type"))
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind == model_type)
    experts = whole(config, "num_local_experts", path) if model_type == "mixtral" else 0
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act is {printable(str(config['hidden_act']), 40)}, only silu is written")
    if config.get("sliding_window"):
        raise InputError(f"config.json: sliding_window is {config['sliding_window']}, which is not written")
    dtype = joined.logical[0].dtype
    if dtype not in DTYPES:
        raise InputError(f"{joined.logical[0].name}: is {dtype}, TensorRT-LLM's model is {', '.join(DTYPES)}")
    moe = {"num_experts": experts, "top_k": whole(config, "num_experts_per_tok", path)} if experts else {}
    return {
        "architecture": architecture,
        "dtype": DTYPES[dtype],
        "logits_dtype": "float32",
        "vocab_size": whole(config, "vocab_size", path),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole(config, "num_key_value_heads", path, heads),
        "head_size": whole(config, "head_dim", path, max(1, hidden // heads)),
        "intermediate_size": whole(config, "intermediate_size", path),
        "hidden_act": "swiglu" if experts else "silu",
        "norm_epsilon": real(config, "rms_norm_eps", path, 1e-6),
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": whole(config, "max_position_embeddings", path, 2048),
        "rotary_base": rope.theta,
        "rotary_scaling": None if rope.scaling is None else dict(rope.scaling),
        "attn_bias": bool(config.get("attention_bias", False)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "moe": {**moe, "normalization_mode": RENORMALIZE} if moe else {"num_experts": 0, "top_k": 0},
        "mapping": _mapping(joined.mesh),
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
