"""Quantised checkpoints: each rank's files, read by themselves, are its part of the dequantised weights; nothing else is
written. Every format is packed and read here by ``tests.quantised_models``, which knows nothing of tpshard."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import quantised_models, quantised_table, tiny_models
from tests.architectures.experts import LATENT
from tests.quantised_models import FORMATS, SIZES, Tensors, layers_of, nibbles, quantise
from tpshard.checkpoint import open_checkpoint, open_full, open_shards
from tpshard.companions import DENSE, assign_stored
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_reshard, plan_split
from tpshard.errors import InputError, PolicyError
from tpshard.layout import Box, Layout, Span
from tpshard.library import choose_policy
from tpshard.mesh import Grid, Mesh
from tpshard.policy_check import check_policy
from tpshard.quantised import read_quantised
from tpshard.verify.companions import check_quantised_layout, fold_quantised
from tpshard.verify.logical import LogicalWeights
from tpshard.verify.report import CheckResult, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify
from tpshard.verify.values import WHOLE, StoredWeights

HEAD, LAYER = 32, "model.layers.0."
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model in a format, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("quantised")

    def make(name: str, **changes: Any) -> Path:
        source = folder / "-".join([name, *map(str, changes.values())]).replace(" ", "-")
        if not source.exists():
            quantised_models.save(name, source, **changes)
        return source

    return make


def split(source: Path, target: Path, tp: int, policy: str = "auto") -> Path:
    run(plan_split(source, target, tp, policy))
    return target


def shard(folder: Path, rank: int, tp: int) -> Tensors:
    return load_file(folder / f"rank-{rank:05d}-of-{tp:05d}.safetensors")


def own_part(layer: str, shape: tuple[int, int], together: int, tp: int, rank: int) -> tuple[slice, slice]:
    """The cells of a llama's weight that a rank has: query heads in even runs, key-value heads with them, channels in
    runs of whole units, the first ranks taking one more."""
    everything = slice(None)
    if layer in ("q_proj", "o_proj"):
        own = slice(rank * 4 * HEAD // tp, (rank + 1) * 4 * HEAD // tp)
    elif layer in ("k_proj", "v_proj"):
        heads = max(1, 2 // tp)
        first = rank * 2 // tp
        own = slice(first * HEAD, (first + heads) * HEAD)
    else:
        size = shape[1] if layer == "down_proj" else shape[0]
        units = np.array_split(np.arange(-(-size // together)), tp)[rank]
        own = slice(int(units[0]) * together, min((int(units[-1]) + 1) * together, size))
    return (everything, own) if layer in ("o_proj", "down_proj") else (own, everything)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_dequantised_is_its_part_of_the_whole_dequantised(
    name: str, tp: int, made: Made, tmp_path: Path
) -> None:
    source, form = made(name), FORMATS[name]
    target = split(source, tmp_path / "shards", tp)
    whole = layers_of(load_file(source / "model.safetensors"))
    ranks = [layers_of(shard(target, rank, tp)) for rank in range(tp)]
    for path in (path for path in whole if path.startswith(LAYER) and path.endswith("proj")):
        dense, layer = form.unpack(whole[path]), path.rpartition(".")[2]
        for rank, own in enumerate(ranks):
            want = dense[own_part(layer, dense.shape, form.together, tp, rank)]
            np.testing.assert_array_equal(form.unpack(own[path]), want, err_msg=f"{path} rank {rank}")


@pytest.mark.parametrize("name", FORMATS)
def test_merged_and_recut_bytes_are_the_same(name: str, made: Made, tmp_path: Path) -> None:
    source = made(name)
    split(source, tmp_path / "two", 2)
    split(source, tmp_path / "four", 4)
    run(plan_reshard(tmp_path / "four", tmp_path / "again", 2))
    run(plan_merge(tmp_path / "again", tmp_path / "merged"))
    for file in (tmp_path / "two").glob("rank-*"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    for file in source.iterdir():
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


QUICK = {"fp8 blocks, the last partial": 4, "gptq, act-order": 2, "awq": 2, "compressed nvfp4": 2}
CASES = [(name, tp) for name in FORMATS for tp in (2, 4)]


@pytest.mark.parametrize(
    ("name", "tp"),
    [pytest.param(*case, marks=() if QUICK.get(case[0]) == case[1] else pytest.mark.slow) for case in CASES],
)
def test_verify_passes(name: str, tp: int, made: Made, tmp_path: Path) -> None:
    source = made(name)
    target = split(source, tmp_path / "shards", tp)
    report = verify(Request(target, against=source, workers=1))
    assert report.verdict is Verdict.PASS, [str(finding) for check in report.checks for finding in check.findings]
    assert [check.name for check in report.checks][:4] == ["files", "weights", "layout", "forward"]
    (forward,) = (check for check in report.checks if check.name == "forward")
    assert any("quantised weights run dequantised" in note for note in forward.notes)
    assert forward.covered["tensors"] == 21  # 9 of each of the two blocks, and three


def test_verify_passes_without_the_source(made: Made, tmp_path: Path) -> None:
    target = split(made("gptq, act-order"), tmp_path / "shards", 2)
    assert verify(Request(target, workers=1)).verdict is Verdict.PASS


# ---------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_any_region(name: str, made: Made, tmp_path: Path) -> None:
    """Whole, of a rank, and odd pieces of both, against the slow reading."""
    source, form = made(name), FORMATS[name]
    shards = open_shards(split(source, tmp_path / "shards", 2))
    full = open_full(source)
    with StoredWeights(shards, full) as stored:
        quantised = read_quantised(full)
        weights = LogicalWeights(stored, quantised, fold_quantised(shards, quantised)[1])
        for layer in ("self_attn.k_proj", "mlp.down_proj"):
            tensors = layers_of(load_file(source / "model.safetensors"))[LAYER + layer]
            own = layers_of(shard(tmp_path / "shards", 1, 2))[LAYER + layer]
            for holder, dense in ((WHOLE, form.unpack(tensors)), (1, form.unpack(own))):
                for box in (Box((0, 0), dense.shape), Box((3, 5), (9, 38)), Box((7, 11), (8, 12))):
                    got = weights.read(f"{LAYER}{layer}.weight", holder, box)
                    assert got.dtype is torch.float64
                    want = dense[box.slices()]
                    np.testing.assert_allclose(got.numpy(), want, rtol=1e-15, atol=0)


def whole_weights(source: Path) -> LogicalWeights:
    full = open_full(source)
    quantised = read_quantised(full)
    layouts = {weight.name: Layout.replicated(weight.shape, 1) for weight in quantised.weights.values()}
    return LogicalWeights(StoredWeights(full, full), quantised, layouts)


def read_all(weights: LogicalWeights, name: str) -> torch.Tensor:
    shape = weights.layout(name).shape
    return weights.read(name, WHOLE, Box((0,) * len(shape), shape))


def test_fp8_blocks_as_transformers_dequantises_them(made: Made) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    source = made("fp8 blocks")
    tensors = layers_of(load_file(source / "model.safetensors"))[LAYER + "mlp.up_proj"]
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    ours = read_all(whole_weights(source), f"{LAYER}mlp.up_proj.weight")
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)


COMPRESSED = [name for name in FORMATS if name.startswith("compressed") and "act-order" not in name]


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_reads_the_same(name: str, made: Made) -> None:
    """Its release 0.20 no longer reads act-order."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    source, config = made(name), FORMATS[name].config
    tensors = layers_of(load_file(source / "model.safetensors"))[LAYER + "mlp.down_proj"]
    if tensors["weight_scale"].dtype == torch.bfloat16:
        tensors["weight_scale"] = tensors["weight_scale"].double()  # in which it computes, then
    args = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    theirs = compressor.decompress(tensors, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    ours = read_all(whole_weights(source), f"{LAYER}mlp.down_proj.weight")
    tolerance = 2**-8 if theirs.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours, theirs.double(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_compressed_tensors_writes_is_read(name: str, made: Made, tmp_path: Path) -> None:
    """One layer of a model packed by the library itself, cut, and read by the library rank by rank."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    source, config = made(name), FORMATS[name].config
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    )
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors = load_file(source / "model.safetensors")
    path = f"{LAYER}mlp.down_proj."
    packed = {name.removeprefix(path): tensor for name, tensor in tensors.items() if name.startswith(path)}
    dense = compressor.decompress(dict(packed), scheme)
    again = compressor.compress({**packed, **dense}, scheme)
    written = {leaf: again[leaf].contiguous() for leaf in packed}
    (tmp_path / "m").mkdir()
    save_file(tensors | {path + leaf: tensor for leaf, tensor in written.items()}, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text((source / "config.json").read_text())
    target = split(tmp_path / "m", tmp_path / "shards", 2)
    for rank in range(2):
        own = {n.removeprefix(path): t for n, t in shard(target, rank, 2).items() if n.startswith(path)}
        if "weight_shape" in own:  # on every rank that of the whole weight
            assert own["weight_shape"].tolist() == [96, 160]
            per = dense["weight"].shape[1] // tensors[f"{path}weight_packed"].shape[1]
            own["weight_shape"] = torch.tensor([96, own["weight_packed"].shape[1] * per])
        got = compressor.decompress(own, scheme)["weight"]
        part = own_part("down_proj", (96, 160), FORMATS[name].together, 2, rank)
        torch.testing.assert_close(got, compressor.decompress(dict(written), scheme)["weight"][part], rtol=0, atol=0)


def test_int8_as_bitsandbytes_dequantises_it(made: Made) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    source = made("bitsandbytes int8")
    tensors = layers_of(load_file(source / "model.safetensors"))[LAYER + "mlp.up_proj"]
    theirs = functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    ours = read_all(whole_weights(source), f"{LAYER}mlp.up_proj.weight")
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------- experts

GPT_OSS = """\
name: oss
extends: llama
rules:
  self_attn.sinks: {rule: column, heads: H}
  mlp.router: replicate
  mlp.experts.{gate_up_proj,gate_up_proj_bias}: {rule: column, dims: eio, unit: 2, uneven: true}
  mlp.experts.{down_proj,down_proj_bias}: {rule: row, dims: eio}
"""


def save_gpt_oss(folder: Path, intermediate_size: int = 96) -> Path:
    """GPT-OSS with experts in MXFP4: blocks of 32 channels, three of them; 64 inputs."""
    sizes = {"hidden_size": 64, "head_dim": 10, "num_local_experts": 5, "vocab_size": 211}
    tiny_models.SIZES["gpt_oss"] = tiny_models.FREE | {"num_experts_per_tok": 2, "num_hidden_layers": 2}
    tiny_models.save_model("gpt_oss", folder, intermediate_size=intermediate_size, **sizes)
    generator = torch.Generator().manual_seed(9)
    tensors: Tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, size, out = value.shape
            codes = torch.randint(0, 16, (experts, out, size // 32, 32), generator=generator)
            tensors[f"{name}_blocks"] = nibbles(codes)
            exponents = torch.randint(118, 123, (experts, out, size // 32), generator=generator)
            tensors[f"{name}_scales"] = exponents.to(torch.uint8)
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder.parent / "oss.yaml").write_text(GPT_OSS)
    return folder


def test_mxfp4_experts(tmp_path: Path) -> None:
    """Read by transformers' own code, as a whole and from each rank's file; channels in blocks of 32, both parts of a
    channel beside one another."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = save_gpt_oss(tmp_path / "model")
    target = split(source, tmp_path / "shards", 2)
    whole, path = load_file(source / "model.safetensors"), "model.layers.1.mlp.experts."
    weights = whole_weights(source)
    for leaf, axis, width in (("gate_up_proj", 2, 2), ("down_proj", 1, 1)):
        names = f"{path}{leaf}_blocks", f"{path}{leaf}_scales"
        dense = convert_moe_packed_tensors(*(whole[name] for name in names), dtype=torch.float64)
        torch.testing.assert_close(read_all(weights, path + leaf), dense, rtol=0, atol=0)
        for rank, channels in enumerate(((0, 64), (64, 96))):
            own = shard(target, rank, 2)
            got = convert_moe_packed_tensors(*(own[name] for name in names), dtype=torch.float64)
            first, last = (width * channel for channel in channels)
            torch.testing.assert_close(got, dense.narrow(axis, first, last - first), rtol=0, atol=0)
    report = verify(Request(target, against=source, workers=1))
    assert report.verdict is not Verdict.FAIL
    for check in report.checks:  # the layout check does not know the architecture
        assert check.verdict is Verdict.PASS or check.name == "layout", (check.name, check.unproven, check.findings)


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    """A raw parameter of three axes, and the scales of key-value caches, which no rule has to name."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 96, 40, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 6, 2, generator=generator)
    tensors = {
        "layers.0.experts.up": weight,
        "layers.0.experts.up_scale_inv": scale,
        "layers.0.attn.k_scale": torch.tensor(0.5),
        "layers.0.down.weight": torch.randn(7, 96, generator=generator),
    }
    tmp_path.joinpath("m").mkdir()
    save_file(tensors, tmp_path / "m/model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    (tmp_path / "m/config.json").write_text(json.dumps({"quantization_config": settings}))
    policy = tmp_path / "p.yaml"
    policy.write_text("name: p\nrules:\n  experts.up: {rule: column, dims: eoi}\n  down: row\n")
    target = split(tmp_path / "m", tmp_path / "s", 2, str(policy))
    for rank, (first, last) in enumerate(((0, 64), (64, 96))):
        own = shard(target, rank, 2)
        torch.testing.assert_close(own["layers.0.experts.up"].float(), weight[:, first:last].float())
        torch.testing.assert_close(own["layers.0.experts.up_scale_inv"], scale[:, first // 16 : last // 16])
        torch.testing.assert_close(own["layers.0.down.weight"], tensors["layers.0.down.weight"][:, first:last])
        assert own["layers.0.attn.k_scale"] == 0.5


# ---------------------------------------------------------------------------------------------- grids

MIXTRAL = """\
name: mixtral
extends: llama
vars: {E: num_local_experts}
rules:
  experts.*.{w1,w3}: {rule: column, experts: E}
  experts.*.w2: {rule: row, experts: E}
  block_sparse_moe.gate: replicate
"""
GRIDS = {
    "groups": Grid(Mesh(tp=2, ep=2)),
    "whole experts": Grid(Mesh(tp=4), whole_experts=True),
    "stages and groups": Grid(Mesh(tp=2, ep=2, pp=2)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fp8 blocks", "groups"),  # 5 blocks of channels for two ranks
        ("fp8 whole", "stages and groups"),  # an expert's one scale is on its group's ranks alone
        ("gptq, act-order", "groups"),  # and so are scales that are whole in a layer that is cut
        ("gptq", "whole experts"),
    ],
)
def test_experts_in_grids(name: str, kind: str, tmp_path: Path) -> None:
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("mixtral", **(tiny_models.DECODER | sizes))
    tiny_models.build(config, "MixtralForCausalLM").save_pretrained(tmp_path / "model")
    quantise(name, tmp_path / "model")
    (tmp_path / "p.yaml").write_text(MIXTRAL)
    run(plan_split(tmp_path / "model", tmp_path / "shards", GRIDS[kind], str(tmp_path / "p.yaml")))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "model", level="forward", workers=1))
    for check in report.checks:
        right = check.verdict is Verdict.PASS or (check.name == "layout" and not check.findings)
        assert right, (check.name, check.unproven, [str(finding) for finding in check.findings])
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("grid", [Grid(Mesh(2)), Grid(Mesh(2, ep=5))], ids=["ranks", "groups"])
def test_deepseek_in_fp8_blocks(grid: Grid, tmp_path: Path) -> None:
    """Latent attention and five experts of 80 channels, two blocks and a half of 32, by the built-in policy."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    sizes = {**LATENT, **heads, "v_head_dim": 32, "moe_intermediate_size": 80, "intermediate_size": 112}
    config = transformers.AutoConfig.for_model("deepseek_v3", **sizes)
    tiny_models.build(config, "DeepseekV3ForCausalLM").save_pretrained(tmp_path / "model")
    quantise("fp8 blocks", tmp_path / "model")
    run(plan_split(tmp_path / "model", tmp_path / "shards", grid))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "model", level="forward", workers=1))
    assert report.verdict is Verdict.PASS, [str(finding) for check in report.checks for finding in check.findings]
    assert all(check.verdict is Verdict.PASS for check in report.checks)


# ---------------------------------------------------------------------------------------------- where ranks meet


def test_layers_that_are_not_quantised_are_dealt_with_those_that_are(made: Made, tmp_path: Path) -> None:
    """One dense down_proj among quantised layers has its channels in the same units; words go one by one."""
    source = made("gptq")
    tensors = load_file(source / "model.safetensors")
    path = "model.layers.1.mlp.down_proj"
    dense = torch.randn(96, 160, generator=torch.Generator().manual_seed(1))
    tensors = {name: t for name, t in tensors.items() if not name.startswith(path)} | {f"{path}.weight": dense}
    tmp_path.joinpath("m").mkdir()
    save_file(tensors, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text((source / "config.json").read_text())
    target = split(tmp_path / "m", tmp_path / "s", 4)
    layouts = {name: tensor.layout for name, tensor in open_shards(target).tensors.items()}
    assert [s.shape[1] for s in layouts[f"{path}.weight"].shards if s] == [48, 48, 32, 32]
    assert [s.shape[0] for s in layouts["lm_head.weight"].shards if s] == [53, 53, 53, 52]
    assert verify(Request(target, against=tmp_path / "m", level="forward", workers=1)).verdict is Verdict.PASS


def test_a_quantised_head_has_its_words_in_blocks(made: Made, tmp_path: Path) -> None:
    """So does the embedding: tied or not, both are cut at the same words."""
    source = made("awq", vocab_size=232)
    tensors = load_file(source / "model.safetensors")
    head = FORMATS["awq"].pack(tensors.pop("lm_head.weight").float(), torch.Generator().manual_seed(2))
    tmp_path.joinpath("m").mkdir()
    save_file(tensors | {f"lm_head.{leaf}": t for leaf, t in head.items()}, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text((source / "config.json").read_text())
    target = split(tmp_path / "m", tmp_path / "s", 2)
    layouts = {name: tensor.layout for name, tensor in open_shards(target).tensors.items()}
    assert [s.shape[1] for s in layouts["lm_head.qweight"].shards if s] == [16, 13]
    assert [s.shape[0] for s in layouts["model.embed_tokens.weight"].shards if s] == [128, 104]
    assert verify(Request(target, against=tmp_path / "m", level="forward", workers=1)).verdict is Verdict.PASS


def test_policy_check_counts_weights_and_knows_the_blocks(made: Made) -> None:
    checkpoint = open_checkpoint(made("fp8 blocks, the last partial"))
    policy = choose_policy("auto", checkpoint.config)
    found = check_policy(policy, checkpoint, (2, 8), read_quantised(checkpoint))
    assert found.tensors == 21
    (down,) = (use for use in found.uses if use.rule and use.rule.key == "mlp.down_proj")
    assert down.cut is not None
    assert [(block.count, block.width, block.short) for block in down.cut.blocks] == [(5, 32, 10)]
    assert found.legal == (1, 2, 4)
    assert [trial.problem == "" for trial in found.trials] == [True, False]


def test_a_cut_inside_a_block_is_refused_with_what_works(made: Made, tmp_path: Path) -> None:
    """Heads of 24 in blocks of 16 rows: at two ranks 48 rows, at four 24."""
    source = made("fp8 blocks", head_dim=24, num_key_value_heads=4)
    with pytest.raises(PolicyError) as caught:
        plan_split(source, tmp_path / "s", 4)
    assert "rank 0 would have a boundary at 24 of axis 0, inside the quantised block 16 to 32" in caught.value.message
    assert "llama.yaml" in caught.value.message
    works = "--tp that works for this checkpoint: 1; or set unit: 48 in the rule"  # o_proj: 48 inputs of blocks of 32
    assert caught.value.hint == works
    with pytest.raises(PolicyError, match="inside the quantised block 32 to 64"):
        plan_split(source, tmp_path / "s", 2)


def test_a_cut_inside_a_word_is_refused(made: Made, tmp_path: Path) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text("name: p\nextends: llama\nrules:\n  self_attn.k_proj: {rule: column, unit: 4, uneven: true}\n")
    with pytest.raises(PolicyError, match="boundary at 20 of axis 0, inside the quantised block 16 to 24") as caught:
        plan_split(made("awq", hidden_size=64, head_dim=20), tmp_path / "s", 2, str(policy))
    assert "set unit: 8" in str(caught.value)


def test_units_of_one_head_are_not_joined(made: Made, tmp_path: Path) -> None:
    """A policy may say heads by their width, on both sides: that is no count of channels."""
    policy = tmp_path / "p.yaml"
    rules = "  self_attn.{q_proj,k_proj}: {rule: column, unit: 32}\n  self_attn.o_proj: {rule: row, unit: 32}\n"
    policy.write_text(f"name: p\nextends: llama\nrules:\n{rules}")
    own = split(made("gptq"), tmp_path / "own", 4, str(policy))
    built_in = split(made("gptq"), tmp_path / "built in", 4)
    for rank in range(4):
        name = f"rank-{rank:05d}-of-00004.safetensors"
        assert (own / name).read_bytes() == (built_in / name).read_bytes()


def test_a_row_whose_column_counts_heads_is_not_joined(made: Made, tmp_path: Path) -> None:
    """Inputs of o_proj dealt one by one, as its heads are: in blocks they would not be those of q_proj."""
    policy = tmp_path / "p.yaml"
    policy.write_text("name: p\nextends: llama\nrules:\n  self_attn.o_proj: row\n")
    source = made("compressed int4", head_dim=20)
    with pytest.raises(PolicyError, match="o_proj: rank 0 would have a boundary at 40 of axis 1, inside"):
        plan_split(source, tmp_path / "s", 2, str(policy))
    split(made("gptq"), tmp_path / "fits", 2, str(policy))


def test_channels_that_go_together_are_not_replicated(tmp_path: Path) -> None:
    """Two blocks of channels for six ranks: what down_proj makes of copies would be added three times."""
    source = save_gpt_oss(tmp_path / "model", intermediate_size=64)
    policy = tmp_path / "oss.yaml"
    policy.write_text(GPT_OSS.replace(", uneven: true", ""))
    with pytest.raises(PolicyError, match="2 units cannot be dealt to 6 ranks") as caught:
        plan_split(source, tmp_path / "s", 6, str(policy))
    assert caught.value.hint == "--tp that works for this checkpoint: 1, 2; or set uneven: true in the rule"


@pytest.mark.parametrize("row", quantised_table.ROWS, ids=lambda row: row.title)
def test_the_table_of_the_docs_says_the_right_multiples(row: quantised_table.Row, made: Made) -> None:
    for name in row.formats:
        weights = read_quantised(open_full(made(name))).weights
        assert weights[f"{LAYER}mlp.down_proj.weight"].form.multiples == quantised_table.multiples(row)


def test_the_table_of_the_docs_has_every_format() -> None:
    assert sorted(name for row in quantised_table.ROWS for name in row.formats) == sorted(FORMATS)
    assert {tp for _, tp in CASES} == {*quantised_table.RANKS}


# ---------------------------------------------------------------------------------------------- faults in layouts


def planted(source: Path, target: Path, name: str, change: Callable[[Layout], Layout]) -> CheckResult:
    """The layout check of shards whose manifest has one companion's layout changed."""
    shards = open_shards(split(source, target, 2))
    wrong = dataclasses.replace(shards.tensors[name], layout=change(shards.tensors[name].layout))
    changed = dataclasses.replace(shards, tensors={**shards.tensors, name: wrong})
    return check_quantised_layout(changed, read_quantised(open_full(source)))


def test_companions_astray_are_found(made: Made, tmp_path: Path) -> None:
    name = f"{LAYER}mlp.down_proj.scales"
    fine = planted(made("gptq"), tmp_path / "a", name, lambda layout: layout)
    assert fine.verdict is Verdict.PASS
    whole = planted(made("gptq"), tmp_path / "b", name, lambda layout: Layout.replicated(layout.shape, 2))
    assert [str(f) for f in whole.findings] == [
        f"{name}, rank 0: has 10 cells along axis 0, its part of {LAYER}mlp.down_proj.weight needs 5"
    ]
    other = planted(made("gptq"), tmp_path / "c", name, lambda layout: Layout(layout.shape, layout.shards[::-1]))
    assert "has other cells than its part of" in str(other.findings[0])
    weight = f"{LAYER}mlp.down_proj.qweight"
    cut = Layout.along((20, 96), 0, [(Span(0, 9),), (Span(9, 20),)], [9, 11])
    inside = planted(made("gptq"), tmp_path / "d", weight, lambda layout: cut)
    assert any("is cut inside a block of 16" in str(finding) for finding in inside.findings)


# ---------------------------------------------------------------------------------------------- refused


def changed(source: Path, folder: Path, config: dict[str, Any], change: Callable[[Tensors], object]) -> Path:
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    whole = json.loads((source / "config.json").read_text())
    whole["quantization_config"] = whole.get("quantization_config", {}) | config
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def nothing(tensors: Tensors) -> None:
    pass


Q_PROJ = f"{LAYER}self_attn.q_proj."
REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], object], str]] = {
    "an unknown method": ("gptq", {"quant_method": "aqlm"}, nothing, "is quantised (aqlm): this method is not known"),
    "bitsandbytes, 4 bits": ("bitsandbytes int8", {"load_in_4bit": True}, nothing, "4-bit weights are one line"),
    "3 bits": ("gptq", {"bits": 3}, nothing, "numbers of 3 bits lie across the edges of words"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, nothing, "its checkpoint_format is marlin"),
    "gemv": ("awq", {"version": "gemv"}, nothing, "AWQ of 4 bits in the form gemv"),
    "another group size": ("gptq", {"group_size": 32}, nothing, "scales is [10, 96], must be [5, 96]"),
    "another block size": ("fp8 blocks", {"weight_block_size": [32, 32]}, nothing, "the config's blocks are 32x32"),
    "no scale": ("fp8 blocks", {}, lambda t: t.pop(f"{Q_PROJ}weight_scale_inv"), "q_proj.weight (F8_E4M3 [128, 96]) is not understood"),
    "no group index": ("gptq, act-order", {}, lambda t: t.pop(f"{Q_PROJ}g_idx"), "has no g_idx, which desc_act asks for"),
    "no zero points": ("gptq", {}, lambda t: t.pop(f"{Q_PROJ}qzeros"), "q_proj has no qzeros"),
    "more beside": ("gptq", {}, lambda t: t.update({f"{Q_PROJ}perm": torch.arange(96)}), "q_proj.perm (I64 [96]) is not understood"),
    "another method's tensors": ("awq", {"quant_method": "fp8"}, nothing, "qweight (I32 [160, 12]) is not understood"),
    "sparse": ("compressed int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, nothing, "sparse weights (sparse-24-bitmask)"),
    "a transform": ("compressed int4", {"transform_config": {"r1": 1}}, nothing, "weights under a transform"),
    "a shape that lies": ("compressed int4", {}, lambda t: t.update({f"{Q_PROJ}weight_shape": torch.tensor([64, 96])}), "weight_shape says [64, 96]"),
    "scaled inputs": ("modelopt nvfp4", {}, lambda t: t.update({f"{Q_PROJ}pre_quant_scale": torch.ones(96)}), "pre_quant_scale"),
    "inputs scaled one by one": ("fp8 whole", {}, lambda t: t.update({f"{Q_PROJ}input_scale": torch.ones(96)}), "must be a single number"),
    "the GPT-2 family": ("gptq", {}, nothing, "the layers of this architecture are [in, out]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_in_one_line(case: str, made: Made, tmp_path: Path) -> None:
    name, config, change, said = REFUSED[case]
    folder = changed(made(name), tmp_path / "m", config, change)
    if case == "the GPT-2 family":
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(text | {"model_type": "gpt2"}))
    with pytest.raises(InputError) as caught:
        plan_split(folder, tmp_path / "s", 2)
    assert said in caught.value.message
    assert caught.value.hint == "dequantise it first"
    assert "\n" not in str(caught.value)


def test_settings_that_are_no_settings(made: Made, tmp_path: Path) -> None:
    folder = changed(made("gptq, settings beside"), tmp_path / "m", {}, nothing)
    text = json.loads((folder / "config.json").read_text())
    del text["quantization_config"]
    (folder / "config.json").write_text(json.dumps(text))
    for content, said in ((None, "but nothing says how"), ("{", "is not JSON"), ("[]", "is not an object")):
        if content is not None:
            (folder / "quantize_config.json").write_text(content)
        with pytest.raises(InputError, match=said):
            plan_split(folder, tmp_path / "s", 2)


def test_a_group_index_out_of_order_counts_whatever_the_config_says(made: Made, tmp_path: Path) -> None:
    """desc_act is false, but one layer's index is not in order: its scales stay whole, the others' are cut."""
    name = f"{LAYER}mlp.down_proj."

    def exchange(tensors: Tensors) -> None:
        index = tensors[f"{name}g_idx"]
        index[[0, 17]] = index[[17, 0]]

    source = changed(made("gptq"), tmp_path / "m", {}, exchange)
    target = split(source, tmp_path / "s", 2)
    own = shard(target, 1, 2)
    assert own[f"{name}scales"].shape[0] == 10
    assert own["model.layers.1.mlp.down_proj.scales"].shape[0] == 5
    assert own[f"{name}g_idx"].tolist() == [5 + i // 16 for i in range(80)]  # numbers of the whole weight's groups
    assert verify(Request(target, against=source, level="forward", workers=1)).verdict is Verdict.PASS


def test_a_dense_checkpoint_is_left_alone(tmp_path: Path) -> None:
    tiny_models.save_model("llama", tmp_path / "m")
    checkpoint = open_full(tmp_path / "m")
    found = read_quantised(checkpoint)
    assert found == DENSE
    policy = choose_policy("auto", checkpoint.config)
    assigned = assign_stored(policy, checkpoint.config, checkpoint.shapes, {}, Grid.of(2), found)
    assert list(assigned.tensors) == list(checkpoint.tensors)
