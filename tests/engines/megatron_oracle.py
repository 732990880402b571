"""A slow, obvious writer of Megatron rank files: every tensor is built whole, then cut by index.

It knows nothing of tpshard. `megatron_truth.py` proves it: megatron-core loads what it writes, strictly, and computes
the logits that transformers computes. Tests then compare tpshard's bytes with these.

One rank's file holds one flat dict of tensors (`mcore-local`, `mcore-te`) or nested ones (`legacy`, `legacy-old`).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


@dataclass(frozen=True, slots=True)
class Shape:
    """What the oracle needs of a Hugging Face config.json."""

    kind: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head: int
    ffn: int
    vocab: int
    experts: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        kind = config["model_type"]
        if kind == "gpt2":
            heads, hidden = config["n_head"], config["n_embd"]
            return cls(kind, config["n_layer"], hidden, heads, heads, hidden // heads,
                       config.get("n_inner") or 4 * hidden, config["vocab_size"], 0, True)  # fmt: skip
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            kind,
            config["num_hidden_layers"],
            hidden,
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["intermediate_size"],
            config["vocab_size"],
            config.get("num_local_experts") or 0,
            bool(config.get("tie_word_embeddings", False)),
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """How the writer is to cut: ranks, names and the row order of query_key_value."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    names: str = "mcore-local"  # mcore-local, mcore-te, legacy, legacy-old (v2.x)
    version: float = 3.0
    divisible_by: int = 128
    experts: str = "local"  # local: local_experts.I; te: linear_fc1.weightI; grouped: weight1, weight2
    virtual: int = 1  # virtual pipeline stages per pipeline rank


def padded_vocab(true_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the vocabulary with padding.

    >>> padded_vocab(100, 128, 2), padded_vocab(257, 128, 2), padded_vocab(512, 128, 2)
    (256, 512, 512)
    """
    multiple = divisible_by * tp
    return math.ceil(true_size / multiple) * multiple


def neutral(hf: Tensors, shape: Shape) -> Tensors:
    """The model under mcore-local names, unsharded: the vocabulary unpadded, q, k, v, gate and up apart."""
    if shape.kind == "gpt2":
        return _from_gpt2(hf, shape)
    if shape.kind == "gpt_neox":
        return _from_neox(hf, shape)
    if shape.kind in LLAMA_LIKE:
        return _from_llama(hf, shape)
    raise ValueError(shape.kind)


def _from_llama(hf: Tensors, shape: Shape) -> Tensors:
    out = {"embed": hf["model.embed_tokens.weight"], "final_layernorm.weight": hf["model.norm.weight"]}
    if not shape.tied:
        out["head"] = hf["lm_head.weight"]
    for n in range(shape.layers):
        a, b = f"model.layers.{n}.", f"layers.{n}."
        out[b + "input_layernorm.weight"] = hf[a + "input_layernorm.weight"]
        out[b + "pre_mlp_layernorm.weight"] = hf[a + "post_attention_layernorm.weight"]
        for part in "qkv":
            for leaf in ("weight", "bias"):
                if a + f"self_attn.{part}_proj.{leaf}" in hf:
                    out[b + f"{part}.{leaf}"] = hf[a + f"self_attn.{part}_proj.{leaf}"]
        for part in "qk":
            if a + f"self_attn.{part}_norm.weight" in hf:
                out[b + f"{part}_layernorm.weight"] = hf[a + f"self_attn.{part}_norm.weight"]
        for leaf in ("weight", "bias"):
            if a + f"self_attn.o_proj.{leaf}" in hf:
                out[b + f"linear_proj.{leaf}"] = hf[a + f"self_attn.o_proj.{leaf}"]
        if not shape.experts:
            for hf_name, name in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "linear_fc2")):
                for leaf in ("weight", "bias"):
                    if a + f"mlp.{hf_name}.{leaf}" in hf:
                        out[b + f"{name}.{leaf}"] = hf[a + f"mlp.{hf_name}.{leaf}"]
            continue
        out[b + "router.weight"] = hf[a + "block_sparse_moe.gate.weight"]
        for e in range(shape.experts):
            for hf_name, name in (("w1", "gate"), ("w3", "up"), ("w2", "linear_fc2")):
                out[b + f"experts.{e}.{name}.weight"] = hf[a + f"block_sparse_moe.experts.{e}.{hf_name}.weight"]
    return out


def _from_gpt2(hf: Tensors, shape: Shape) -> Tensors:
    hf = {name.removeprefix("transformer."): tensor for name, tensor in hf.items()}
    out = {"embed": hf["wte.weight"], "positions": hf["wpe.weight"]}
    for leaf in ("weight", "bias"):
        out[f"final_layernorm.{leaf}"] = hf[f"ln_f.{leaf}"]
    for n in range(shape.layers):
        a, b = f"h.{n}.", f"layers.{n}."
        for leaf in ("weight", "bias"):
            out[b + f"input_layernorm.{leaf}"] = hf[a + f"ln_1.{leaf}"]
            out[b + f"pre_mlp_layernorm.{leaf}"] = hf[a + f"ln_2.{leaf}"]
            # Conv1D keeps (in, out); a linear layer (out, in).
            for part, tensor in zip("qkv", hf[a + f"attn.c_attn.{leaf}"].t().chunk(3, 0), strict=True):
                out[b + f"{part}.{leaf}"] = tensor
            out[b + f"linear_proj.{leaf}"] = hf[a + f"attn.c_proj.{leaf}"].t()
            out[b + f"plain_fc1.{leaf}"] = hf[a + f"mlp.c_fc.{leaf}"].t()
            out[b + f"linear_fc2.{leaf}"] = hf[a + f"mlp.c_proj.{leaf}"].t()
    return out


def _from_neox(hf: Tensors, shape: Shape) -> Tensors:
    out = {"embed": hf["gpt_neox.embed_in.weight"]}
    if not shape.tied:
        out["head"] = hf["embed_out.weight"] if "embed_out.weight" in hf else hf["lm_head.weight"]
    for leaf in ("weight", "bias"):
        out[f"final_layernorm.{leaf}"] = hf[f"gpt_neox.final_layer_norm.{leaf}"]
    for n in range(shape.layers):
        a, b = f"gpt_neox.layers.{n}.", f"layers.{n}."
        for leaf in ("weight", "bias"):
            out[b + f"input_layernorm.{leaf}"] = hf[a + f"input_layernorm.{leaf}"]
            out[b + f"pre_mlp_layernorm.{leaf}"] = hf[a + f"post_attention_layernorm.{leaf}"]
            fused = hf[a + f"attention.query_key_value.{leaf}"]
            by_head = fused.reshape(shape.heads, 3, shape.head, *fused.shape[1:])
            for i, part in enumerate("qkv"):
                out[b + f"{part}.{leaf}"] = by_head[:, i].reshape(-1, *fused.shape[1:])
            out[b + f"linear_proj.{leaf}"] = hf[a + f"attention.dense.{leaf}"]
            out[b + f"plain_fc1.{leaf}"] = hf[a + f"mlp.dense_h_to_4h.{leaf}"]
            out[b + f"linear_fc2.{leaf}"] = hf[a + f"mlp.dense_4h_to_h.{leaf}"]
    return out


def fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Rows by query group, [q … q, k, v] each; with one query a group this is the [heads, 3, head] of version 2."""
    rest = q.shape[1:]
    rows = []
    per_group = shape.heads // shape.groups
    for g in range(shape.groups):
        rows.append(q[g * per_group * shape.head : (g + 1) * per_group * shape.head])
        rows.append(k[g * shape.head : (g + 1) * shape.head])
        rows.append(v[g * shape.head : (g + 1) * shape.head])
    return torch.cat(rows).reshape(-1, *rest)


def older_rows(local: torch.Tensor, heads_here: int, head: int, version: float) -> torch.Tensor:
    """One rank's rows [heads, 3, head] in the order of checkpoint_version 0 ([3, heads, head]) or 1 ([heads, head, 3])."""
    rest = local.shape[1:]
    by_head = local.reshape(heads_here, 3, head, *rest)
    if version == 0:
        by_head = by_head.transpose(0, 1)
    elif version == 1:
        by_head = by_head.transpose(1, 2)
    return by_head.reshape(-1, *rest).contiguous()


def vocabulary_rows(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    extra = padded_vocab(tensor.shape[0], cut.divisible_by, cut.tp) - tensor.shape[0]
    return torch.cat([tensor, torch.zeros(extra, *tensor.shape[1:], dtype=tensor.dtype)])


def part(tensor: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    assert tensor.shape[dim] % ranks == 0, (tensor.shape, dim, ranks)
    return tensor.chunk(ranks, dim)[rank].clone(memory_format=torch.contiguous_format)


def layer_of_rank(whole: Tensors, shape: Shape, cut: Cut, layer: int, t: int, e: int) -> Tensors:
    """One layer on tensor rank t and expert rank e, under mcore-local names (without `decoder.layers.N.`)."""
    a = f"layers.{layer}."
    mine = {name.removeprefix(a): tensor for name, tensor in whole.items() if name.startswith(a)}
    out: Tensors = {}
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        for leaf in ("weight", "bias"):
            if f"{norm}.{leaf}" in mine:
                out[f"{norm}.{leaf}"] = mine[f"{norm}.{leaf}"].clone()
    for norm in ("q_layernorm", "k_layernorm"):
        if f"{norm}.weight" in mine:
            out[f"self_attention.{norm}.weight"] = mine[f"{norm}.weight"].clone()
    for leaf in ("weight", "bias"):
        if f"q.{leaf}" in mine:
            fused = fused_qkv(mine[f"q.{leaf}"], mine[f"k.{leaf}"], mine[f"v.{leaf}"], shape)
            local = part(fused, 0, t, cut.tp)
            if cut.version < 2:
                local = older_rows(local, shape.heads // cut.tp, shape.head, cut.version)
            out[f"self_attention.linear_qkv.{leaf}"] = local
    out["self_attention.linear_proj.weight"] = part(mine["linear_proj.weight"], 1, t, cut.tp)
    if "linear_proj.bias" in mine:
        out["self_attention.linear_proj.bias"] = mine["linear_proj.bias"].clone()
    if shape.experts:
        out |= _experts(mine, shape, cut, t, e)
        return out
    for leaf in ("weight", "bias"):
        if f"gate.{leaf}" in mine:
            both = [part(mine[f"{name}.{leaf}"], 0, t, cut.tp) for name in ("gate", "up")]
            out[f"mlp.linear_fc1.{leaf}"] = torch.cat(both)
        elif f"plain_fc1.{leaf}" in mine:
            out[f"mlp.linear_fc1.{leaf}"] = part(mine[f"plain_fc1.{leaf}"], 0, t, cut.tp)
    out["mlp.linear_fc2.weight"] = part(mine["linear_fc2.weight"], 1, t, cut.tp)
    if "linear_fc2.bias" in mine:
        out["mlp.linear_fc2.bias"] = mine["linear_fc2.bias"].clone()
    return out


def _experts(mine: Tensors, shape: Shape, cut: Cut, t: int, e: int) -> Tensors:
    out = {"mlp.router.weight": mine["router.weight"].clone()}
    here = shape.experts // cut.ep
    one, two = [], []
    for i in range(here):
        a = f"experts.{e * here + i}."
        both = [part(mine[a + f"{name}.weight"], 0, t, cut.tp) for name in ("gate", "up")]
        one.append(torch.cat(both))
        two.append(part(mine[a + "linear_fc2.weight"], 1, t, cut.tp))
    if cut.experts == "grouped":
        # The parameter is declared (hidden, experts * ffn) but used as [experts, hidden, ffn]: its bytes are the latter.
        out["mlp.experts.weight1"] = torch.stack([w.T for w in one]).reshape(shape.hidden, -1).contiguous()
        out["mlp.experts.weight2"] = torch.stack([w.T for w in two]).reshape(-1, shape.hidden).contiguous()
        return out
    for i, (w1, w2) in enumerate(zip(one, two, strict=True)):
        if cut.experts == "local":
            out[f"mlp.experts.local_experts.{i}.linear_fc1.weight"] = w1
            out[f"mlp.experts.local_experts.{i}.linear_fc2.weight"] = w2
        elif cut.experts == "te":
            out[f"mlp.experts.linear_fc1.weight{i}"] = w1
            out[f"mlp.experts.linear_fc2.weight{i}"] = w2
        else:
            raise ValueError(cut.experts)
    return out


def stage_layers(shape: Shape, cut: Cut, p: int, v: int) -> range:
    """Layers of pipeline rank p, virtual stage v: chunk c = v * pp + p of pp * virtual even chunks."""
    chunks = cut.pp * cut.virtual
    assert shape.layers % chunks == 0
    per = shape.layers // chunks
    first = (v * cut.pp + p) * per
    return range(first, first + per)


def model_of_rank(whole: Tensors, shape: Shape, cut: Cut, t: int, p: int, e: int, v: int = 0) -> Tensors:
    """The flat dict of one rank (and virtual stage) under mcore-local names."""
    out: Tensors = {}
    first, last = p == 0 and v == 0, p == cut.pp - 1 and v == cut.virtual - 1
    if first:
        out["embedding.word_embeddings.weight"] = part(vocabulary_rows(whole["embed"], cut), 0, t, cut.tp)
        if "positions" in whole:
            out["embedding.position_embeddings.weight"] = whole["positions"].clone()
    for local, layer in enumerate(stage_layers(shape, cut, p, v)):
        for name, tensor in layer_of_rank(whole, shape, cut, layer, t, e).items():
            out[f"decoder.layers.{local}.{name}"] = tensor
    if last:
        for leaf in ("weight", "bias"):
            if f"final_layernorm.{leaf}" in whole:
                out[f"decoder.final_layernorm.{leaf}"] = whole[f"final_layernorm.{leaf}"].clone()
        if "head" in whole:
            out["output_layer.weight"] = part(vocabulary_rows(whole["head"], cut), 0, t, cut.tp)
        elif not first:  # tied, but on another process than the embedding: its own copy
            out["output_layer.weight"] = part(vocabulary_rows(whole["embed"], cut), 0, t, cut.tp)
    return out


def renamed(flat: Tensors, cut: Cut, tied: bool) -> dict[str, Any]:
    if cut.names == "mcore-local":
        return dict(flat)
    if cut.names == "mcore-te":
        return _te_names(flat)
    if cut.names in ("legacy", "legacy-old"):
        return _legacy_names(flat, old=cut.names == "legacy-old", tied=tied)
    raise ValueError(cut.names)


def _te_names(flat: Tensors) -> dict[str, Any]:
    """Transformer Engine folds the norm into the linear layer that follows it; of an MoE block only the first one.

    Real files also hold `X._extra_state` (None, or a tensor of bytes with FP8); a strict load here must not see them.
    """
    moe = any(".mlp.router." in name for name in flat)
    out = {}
    for name, tensor in flat.items():
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        if not moe:
            name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        out[name] = tensor
    return out


def _legacy_names(flat: Tensors, old: bool, tied: bool) -> dict[str, Any]:
    words = [
        (".input_layernorm.", ".input_layernorm." if old else ".input_norm."),
        (".pre_mlp_layernorm.", ".post_attention_layernorm." if old else ".post_attention_norm."),
        ("final_layernorm.", "final_layernorm." if old else "final_norm."),
        (".self_attention.linear_qkv.", ".attention.query_key_value." if old else ".self_attention.query_key_value."),
        (".self_attention.linear_proj.", ".attention.dense." if old else ".self_attention.dense."),
        (".mlp.linear_fc1.", ".mlp.dense_h_to_4h."),
        (".mlp.linear_fc2.", ".mlp.dense_4h_to_h."),
    ]
    language: dict[str, Any] = {}
    model: dict[str, Any] = {"language_model": language}
    encoder: dict[str, Any] = {}
    for name, tensor in flat.items():
        if name.startswith("embedding."):
            _, table, leaf = name.split(".")
            language.setdefault("embedding", {})[table] = {leaf: tensor}
        elif name == "output_layer.weight" and tied:
            model["word_embeddings_for_head"] = {"weight": tensor}
        elif name == "output_layer.weight":
            language["output_layer"] = {"weight": tensor}
        else:
            name = name.removeprefix("decoder.")
            for before, after in words:
                name = name.replace(before, after)
            encoder[name] = tensor
    language["transformer" if old else "encoder"] = encoder
    return model


def rank_models(hf: Tensors, config: dict[str, Any], cut: Cut) -> dict[tuple[int, int, int], dict[str, Any]]:
    """(t, p, e) -> {"model": …} or {"model0": …, "model1": …}."""
    shape = Shape.of(config)
    if cut.version < 2:
        assert shape.groups == shape.heads, "rows by query group came with version 3"
    whole = neutral(hf, shape)
    out = {}
    for t in range(cut.tp):
        for p in range(cut.pp):
            for e in range(cut.ep):
                stages = [
                    renamed(model_of_rank(whole, shape, cut, t, p, e, v), cut, shape.tied) for v in range(cut.virtual)
                ]
                many = cut.virtual > 1
                out[t, p, e] = {f"model{v}" if many else "model": stage for v, stage in enumerate(stages)}
    return out


def arguments(config: dict[str, Any], cut: Cut) -> argparse.Namespace:
    """What Megatron's loader, its converters and importers read of `args` (the least a useful file must hold)."""
    shape = Shape.of(config)
    llama = shape.kind in LLAMA_LIKE
    positions = config.get("max_position_embeddings") or config["n_positions"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    args = argparse.Namespace(
        num_layers=shape.layers,
        encoder_num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        group_query_attention=shape.groups != shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head,
        seq_length=positions,
        max_position_embeddings=positions,
        position_embedding_type="learned_absolute" if shape.kind == "gpt2" else "rope",
        add_position_embedding=True,  # a default that training compares, whatever the positions are
        use_rotary_position_embeddings=shape.kind != "gpt2",
        rotary_base=int(theta),
        rotary_percent=config.get("rotary_pct")
        or (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0),
        rotary_interleaved=False,
        normalization="RMSNorm" if llama else "LayerNorm",
        norm_epsilon=config.get("rms_norm_eps") or config.get("layer_norm_eps") or config.get("layer_norm_epsilon"),
        layernorm_epsilon=config.get("rms_norm_eps")
        or config.get("layer_norm_eps")
        or config.get("layer_norm_epsilon"),
        swiglu=llama,
        squared_relu=False,
        openai_gelu=False,
        add_bias_linear=not llama,
        disable_bias_linear=llama,
        add_qkv_bias=shape.kind == "qwen2",
        qk_layernorm=shape.kind == "qwen3",
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not shape.tied,
        num_experts=shape.experts or None,
        moe_router_topk=config.get("num_experts_per_tok", 2),
        moe_ffn_hidden_size=shape.ffn if shape.experts else None,
        moe_grouped_gemm=cut.experts != "local",
        make_vocab_size_divisible_by=cut.divisible_by,
        padded_vocab_size=padded_vocab(shape.vocab, cut.divisible_by, cut.tp),
        vocab_size=shape.vocab,
        tokenizer_type="NullTokenizer",
        tensor_model_parallel_size=cut.tp,
        pipeline_model_parallel_size=cut.pp,
        virtual_pipeline_model_parallel_size=cut.virtual if cut.virtual > 1 else None,
        num_layers_per_virtual_pipeline_stage=shape.layers // (cut.pp * cut.virtual) if cut.virtual > 1 else None,
        expert_model_parallel_size=cut.ep,
        sequence_parallel=False,
        params_dtype=torch.float32,
        fp16=False,
        bf16=False,
        iteration=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        bert_binary_head=True,
        transformer_impl="local" if cut.names == "mcore-local" else "transformer_engine",
        use_mcore_models=cut.names.startswith("mcore"),
        use_legacy_models=cut.names.startswith("legacy"),
    )
    if cut.version < 3:
        args.model_parallel_size = cut.tp
        del args.tensor_model_parallel_size
    return args


def rank_folder(cut: Cut, t: int, p: int, e: int) -> str:
    """The name of one rank's folder.

    >>> rank_folder(Cut(tp=2), 1, 0, 0), rank_folder(Cut(tp=2, pp=2), 1, 1, 0), rank_folder(Cut(pp=2, ep=2), 0, 1, 1)
    ('mp_rank_01', 'mp_rank_01_001', 'mp_rank_00_001_001')
    """
    name = f"mp_rank_{t:02d}"
    if cut.pp > 1:
        name += f"_{p:03d}"
    if cut.ep > 1:
        name += f"_{e:03d}"
    return name


def write_folder(folder: Path, hf: Tensors, config: dict[str, Any], cut: Cut, iteration: int = 1) -> None:
    """A legacy folder as save_checkpoint with `--ckpt-format torch` leaves it, without optimizer and random state."""
    folder.mkdir(parents=True, exist_ok=True)
    args = arguments(config, cut)
    for (t, p, e), models in rank_models(hf, config, cut).items():
        record: dict[str, Any] = {"args": args}
        if cut.version > 0:
            record["checkpoint_version"] = cut.version
        record |= {"iteration": iteration} | models
        record["num_floating_point_operations_so_far"] = 0
        home = folder / f"iter_{iteration:07d}" / rank_folder(cut, t, p, e)
        home.mkdir(parents=True)
        torch.save(record, home / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
