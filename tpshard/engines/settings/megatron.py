"""Megatron-LM's values beside the tensors: the arguments of the training run, and the version of the rows' order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tpshard.engines.joints import Joined
from tpshard.engines.settings.kind import Settings, Told
from tpshard.errors import InputError, printable
from tpshard.frames import Tensor
from tpshard.pickle_machine import Call, Global

TRACKER = "latest_checkpointed_iteration.txt"
NAMESPACE = Global("argparse", "Namespace")
TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
VERSION = 3.0  # rows by query group, since Megatron-LM 3.0
DIVISIBLE_BY = 128  # Megatron-LM's own default: the vocabulary is padded to a multiple of it on each rank
VERSIONS = {0: "0", 1.0: "1", 2.0: "", 3.0: ""}  # from 2.0 on one order

# HF config.json key: the argument that says it. Those of a model that is made of other parts follow in code.
_SAID = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
}


class Megatron(Settings):
    """``args``, ``checkpoint_version`` and ``iteration`` of every rank's file."""

    own_files = (TRACKER,)
    inert = (
        ("argparse", "Namespace"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),
        ("megatron.enums", "AttnBackend"),
        ("megatron.core.transformer.enums", "AttnBackend"),
        ("megatron.core.enums", "ModelType"),
        ("megatron.model.enums", "PositionEmbeddingType"),
    )

    def version(self, told: Told) -> str:
        if told.store:
            return ""  # stores are newer than all the orders of rows
        found = told.objects[0].get("checkpoint_version", 0)
        if found not in VERSIONS:
            known = ", ".join(map(str, VERSIONS))
            raise InputError(f"{told.folder}: checkpoint_version {printable(repr(found), 40)}, {known} are read")
        return VERSIONS[found]

    def config(self, told: Told) -> dict[str, Any]:
        self._check_alike(told)
        args = _arguments(told.objects[0])
        if not args:
            return {}
        if not told.store:
            self._check_ranks(told, args)
        return _config_of(args)

    def _check_alike(self, told: Told) -> None:
        for key in ("iteration", "checkpoint_version"):
            said = [objects.get(key) for objects in told.objects]
            for rank, value in enumerate(said):
                if value != said[0]:
                    what = f"rank 0 says {key} {printable(repr(said[0]), 40)}, rank {rank} {printable(repr(value), 40)}"
                    raise InputError(f"{told.folder}: {what}", hint="were files of two runs mixed?")

    def _check_ranks(self, told: Told, args: Mapping[str, Any]) -> None:
        experts = args.get("expert_model_parallel_size", 1)
        if isinstance(experts, int) and experts > 1:
            what = f"its arguments say expert_model_parallel_size {experts}; groups of experts are not read"
            raise InputError(f"{told.folder}: {what}", hint="save it with one group")
        for key, count in (
            ("tensor_model_parallel_size", told.mesh.tp),
            ("model_parallel_size", told.mesh.tp),
            ("pipeline_model_parallel_size", told.mesh.pp),
        ):
            if isinstance(args.get(key), int) and args[key] != count:
                what = f"its arguments say {key} {args[key]}, there are files of {count}"
                raise InputError(f"{told.folder}: {what}", hint="is the folder complete?")

    def files(self, joined: Joined) -> dict[str, bytes]:
        return {TRACKER: b"release"}

    def objects(self, joined: Joined, rank: int, tensors: Sequence[Tensor]) -> dict[str, Any]:
        return {
            "args": Call(NAMESPACE, (), arguments_of(joined)),
            "checkpoint_version": VERSION,
            "iteration": 0,
        }


def _arguments(objects: Mapping[Any, Any]) -> Mapping[str, Any]:
    args = objects.get("args")
    return args.state if isinstance(args, Call) and isinstance(args.state, dict) else {}


def _config_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as far as the arguments say it; empty where they are of no model that is known."""
    model_type = _model_type(args)
    if not model_type or any(not isinstance(args.get(said), int) for said in _SAID.values() if said != "kv_channels"):
        return {}
    config: dict[str, Any] = {key: args[said] for key, said in _SAID.items() if isinstance(args.get(said), int)}
    config["model_type"] = model_type
    config["vocab_size"] = args.get("vocab_size") or args.get("padded_vocab_size")
    config["tie_word_embeddings"] = not args.get("untie_embeddings_and_output_weights", True)
    groups = args.get("num_query_groups") if args.get("group_query_attention") else None
    config["num_key_value_heads"] = groups or args["num_attention_heads"]
    epsilon = args.get("norm_epsilon") or args.get("layernorm_epsilon")
    if model_type == "gpt2":
        return _gpt2(config, epsilon)
    if model_type == "gpt_neox":
        return {**config, "layer_norm_eps": epsilon, "rotary_pct": args.get("rotary_percent", 1.0)}
    config |= {"rms_norm_eps": epsilon, "hidden_act": "silu", "rope_theta": float(args.get("rotary_base", 10000))}
    if model_type == "mixtral":
        config |= {"num_local_experts": args["num_experts"], "num_experts_per_tok": args.get("moe_router_topk", 2)}
    return config


def _gpt2(config: Mapping[str, Any], epsilon: object) -> dict[str, Any]:
    words = {
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "vocab_size": "vocab_size",
    }
    own = {key: config[said] for key, said in words.items()}
    return {**own, "model_type": "gpt2", "layer_norm_epsilon": epsilon, "tie_word_embeddings": True}


def _model_type(args: Mapping[str, Any]) -> str:
    positions = args.get("position_embedding_type")
    rope = positions == "rope" or bool(args.get("use_rotary_position_embeddings"))
    if args.get("normalization") == "RMSNorm" and args.get("swiglu") and rope:
        if args.get("num_experts"):
            return "mixtral"
        return "qwen3" if args.get("qk_layernorm") else "qwen2" if args.get("add_qkv_bias") else "llama"
    if args.get("normalization", "LayerNorm") == "LayerNorm" and not args.get("swiglu"):
        return "gpt_neox" if rope else "gpt2"
    return ""


def arguments_of(joined: Joined) -> dict[str, Any]:
    """What Megatron-LM's loader and its converters read of the arguments."""
    return {**_sizes(joined), **_kind(joined), **_ranks(joined)}


def _said(config: Mapping[str, Any], *keys: str, otherwise: Any = None) -> Any:
    """Under the first of several keys that is there."""
    return next((config[key] for key in keys if config.get(key) is not None), otherwise)


def _sizes(joined: Joined) -> dict[str, Any]:
    config, multiple = joined.config, DIVISIBLE_BY * joined.mesh.tp
    heads, hidden = _said(config, "num_attention_heads", "n_head"), _said(config, "hidden_size", "n_embd")
    groups, inner = _said(config, "num_key_value_heads", otherwise=heads), 4 * hidden
    positions = _said(config, "max_position_embeddings", "n_positions", otherwise=0)
    experts = config.get("num_local_experts")
    return {
        "num_layers": _said(config, "num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "ffn_hidden_size": _said(config, "intermediate_size", "n_inner", otherwise=inner),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": _said(config, "head_dim", otherwise=hidden // heads),
        "seq_length": positions,
        "max_position_embeddings": positions,
        "num_experts": experts,
        "moe_router_topk": _said(config, "num_experts_per_tok", otherwise=2),
        "moe_ffn_hidden_size": config.get("intermediate_size") if experts else None,
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "padded_vocab_size": math.ceil(config["vocab_size"] / multiple) * multiple,
        "vocab_size": config["vocab_size"],
    }


def _kind(joined: Joined) -> dict[str, Any]:
    config, names = joined.config, [tensor.name for tensor in joined.logical]
    learned = config.get("model_type") == "gpt2"
    plain = learned or config.get("model_type") == "gpt_neox"
    rope = _said(config, "rope_parameters", "rope_scaling", otherwise={})
    epsilon = _said(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", otherwise=1e-5)
    tied = joined.family.tied
    return {
        "position_embedding_type": "learned_absolute" if learned else "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": not learned,
        "rotary_base": int(_said(config, "rope_theta", otherwise=rope.get("rope_theta", 10000))),
        "rotary_percent": float(_said(config, "rotary_pct", otherwise=rope.get("partial_rotary_factor", 1.0))),
        "rotary_interleaved": False,
        "normalization": "LayerNorm" if plain else "RMSNorm",
        "norm_epsilon": epsilon,
        "layernorm_epsilon": epsilon,
        "swiglu": not plain,
        "squared_relu": False,
        "bias_gelu_fusion": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "openai_gelu": False,
        "add_bias_linear": plain,
        "add_qkv_bias": any(name.endswith("q_proj.bias") for name in names),
        "qk_layernorm": any(name.endswith("q_norm.weight") for name in names),
        "untie_embeddings_and_output_weights": tied is not None and tied.head in names,
    }


def _ranks(joined: Joined) -> dict[str, Any]:
    dtype = joined.logical[0].dtype
    return {
        "tensor_model_parallel_size": joined.mesh.tp,
        "pipeline_model_parallel_size": joined.mesh.pp,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
        "params_dtype": Global("torch", TORCH_DTYPES.get(dtype, "float32")),
        "fp16": dtype == "F16",
        "bf16": dtype == "BF16",
        "tokenizer_type": "NullTokenizer",
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "use_mcore_models": True,
        "use_legacy_models": False,
        "transformer_impl": "local" if joined.family.variant == "local" else "transformer_engine",
    }
