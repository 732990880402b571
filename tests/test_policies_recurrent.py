"""Policies of state-space models and linear attention: their most intricate cuts worked by hand, and wrong ones seen
to fail."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures import Architecture
from tests.architectures.recurrent import ARCHITECTURES
from tests.planting import along, reverse, whole
from tests.proof import Arrays, cut_arrays, save
from tests.test_layout_check import changed, one_of_each_kind, said
from tests.test_policies import rows
from tpshard.checkpoint import Checkpoint, open_shards
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.errors import PolicyError
from tpshard.layout import Layout
from tpshard.library import builtin_policies
from tpshard.mesh import Grid, Mesh
from tpshard.roles import Role
from tpshard.stages import deal_stages
from tpshard.verify.families import recurrent
from tpshard.verify.report import CheckResult, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify


def architecture(name: str, **changes: Any) -> Architecture:
    found = next(known for known in ARCHITECTURES if known.name == name)
    return dataclasses.replace(found, sizes={**found.sizes, **changes})


def shards_of(folder: Path, name: str, tp: int) -> tuple[Arrays, list[Arrays]]:
    """The source's tensors and each rank's, as arrays."""
    save(architecture(name), folder / "source")
    return cut_arrays(folder, tp)


# ---------------------------------------------------------------------------------------------- worked by hand


def test_mamba2_fused_projection_with_fewer_groups_than_ranks(tmp_path: Path) -> None:
    """Eight heads of 14 and two groups of 6: z is rows 0 to 111, x 112 to 223, B 224 to 235, C 236 to 247, dt 248 to
    255. Rank 2 of 4 has heads 4 and 5, of the second group, as rank 3 has."""
    whole, ranks = shards_of(tmp_path, "mamba2", 4)
    layer = "backbone.layers.1.mixer"
    mine = rows((56, 84), (168, 196), (230, 236), (242, 248), (252, 254))
    np.testing.assert_array_equal(ranks[2][f"{layer}.in_proj.weight"], whole[f"{layer}.in_proj.weight"][mine])
    mine = rows((84, 112), (118, 124), (130, 136))  # of conv1d, x | B | C: rank 3's
    np.testing.assert_array_equal(ranks[3][f"{layer}.conv1d.weight"], whole[f"{layer}.conv1d.weight"][mine])
    np.testing.assert_array_equal(ranks[3][f"{layer}.conv1d.bias"], whole[f"{layer}.conv1d.bias"][mine])
    np.testing.assert_array_equal(ranks[3][f"{layer}.dt_bias"], whole[f"{layer}.dt_bias"][6:])
    np.testing.assert_array_equal(ranks[3][f"{layer}.norm.weight"], whole[f"{layer}.norm.weight"])
    np.testing.assert_array_equal(ranks[3][f"{layer}.out_proj.weight"], whole[f"{layer}.out_proj.weight"][:, 84:])


def test_qwen3_next_fused_by_key_head(tmp_path: Path) -> None:
    """Two key heads of 6, eight value heads of 10: a key head's rows are q 6, k 6, v 40, z 40, and b 4, a 4. Rank 1 of
    4 has value heads 2 and 3, whose key head is the first; the convolution has q | k | v in blocks."""
    whole, ranks = shards_of(tmp_path, "qwen3_next", 4)
    layer = "model.layers.0.linear_attn"
    for name, size in (("in_proj_qkvz", 92), ("in_proj_ba", 8)):
        np.testing.assert_array_equal(ranks[1][f"{layer}.{name}.weight"], whole[f"{layer}.{name}.weight"][:size])
    mine = rows((0, 6), (12, 18), (44, 64))
    np.testing.assert_array_equal(ranks[1][f"{layer}.conv1d.weight"], whole[f"{layer}.conv1d.weight"][mine])
    np.testing.assert_array_equal(ranks[1][f"{layer}.A_log"], whole[f"{layer}.A_log"][2:4])
    np.testing.assert_array_equal(ranks[1][f"{layer}.out_proj.weight"], whole[f"{layer}.out_proj.weight"][:, 20:40])


def test_zamba_interleaved_projection(tmp_path: Path) -> None:
    """Two Mamba heads of 48 channels, x and z interleaved: rank 1 has rows 96 to 191."""
    whole, ranks = shards_of(tmp_path, "zamba", 2)
    layer = "model.layers.0.mamba"
    np.testing.assert_array_equal(ranks[1][f"{layer}.in_proj.weight"], whole[f"{layer}.in_proj.weight"][96:])
    np.testing.assert_array_equal(ranks[1][f"{layer}.conv1d.bias"], whole[f"{layer}.conv1d.bias"][48:])
    for name in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"):
        np.testing.assert_array_equal(ranks[1][f"{layer}.{name}"], whole[f"{layer}.{name}"][1:])


def test_mamba_channels_dealt_unevenly(tmp_path: Path) -> None:
    """88 channels on three ranks: 30, 29, 29. x is rows 0 to 87 of in_proj, z 88 to 175; x_proj takes the channels."""
    whole, ranks = shards_of(tmp_path, "mamba", 3)
    layer = "backbone.layers.0.mixer"
    mine = rows((30, 59), (118, 147))
    np.testing.assert_array_equal(ranks[1][f"{layer}.in_proj.weight"], whole[f"{layer}.in_proj.weight"][mine])
    np.testing.assert_array_equal(ranks[1][f"{layer}.x_proj.weight"], whole[f"{layer}.x_proj.weight"][:, 30:59])
    for name in ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D"):
        np.testing.assert_array_equal(ranks[1][f"{layer}.{name}"], whole[f"{layer}.{name}"][30:59])


# ---------------------------------------------------------------------------------------------- what the layout check knows

KNOWN = [found for found in ARCHITECTURES if found.model_type in recurrent.FAMILIES]


@functools.cache
def split(name: str, tp: int) -> Checkpoint:
    """Shards; only what the manifest says of them is used after their folder is gone."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "shards")
        save(architecture(name, tie_word_embeddings=False), source)
        run(plan_split(source, target, tp))
        return open_shards(target)


@pytest.mark.parametrize("found", KNOWN, ids=lambda found: found.name)
def test_what_split_writes_has_the_layout_that_config_asks_for(found: Architecture) -> None:
    for tp in found.tp:
        assert said(split(found.name, tp)) == [], tp


@pytest.mark.parametrize("found", KNOWN, ids=lambda found: found.name)
def test_each_tensor_dealt_otherwise_is_named(found: Architecture) -> None:
    """In reverse rank order, and whole (but not what is gathered, or an embedding); what is whole, cut (but not gated
    norms)."""
    shards = split(found.name, 2)
    for name in one_of_each_kind(shards):
        layout, gathered = shards.tensors[name].layout, shards.tensors[name].role.gather == "output"
        if layout.is_replicated:
            size, axis = max((size, axis) for axis, size in enumerate(layout.shape))
            wrong = (
                [] if name.endswith(("mixer.norm.weight", "mamba.norm.weight")) else [along(axis, [0, size // 2, size])]
            )
        else:
            wrong = [reverse] + [whole] * (not gathered and "embed" not in name)
        role = Role("column") if gathered else None
        for number, change in enumerate(wrong):
            texts = said(changed(shards, name, change, role))
            assert any(text.startswith(name) for text in texts), (name, number, texts)


def test_a_group_that_the_ranks_heads_do_not_use() -> None:
    """Four ranks, two groups: ranks 0 and 1 share the first. Dealt as 0 1 0 1, the forward of heads 2 and 3 is wrong."""
    shards = split("mamba2", 4)
    name = "backbone.layers.1.mixer.conv1d.bias"

    def by_turns(layout: Layout) -> Layout:
        second, third = layout.shards[1:3]
        swapped = [dataclasses.replace(own, spans=((own.spans[0][0], *other.spans[0][1:]),))
                   for own, other in ((second, third), (third, second)) if own and other]  # fmt: skip
        return Layout(layout.shape, (layout.shards[0], *swapped, layout.shards[3]))

    (finding,) = said(changed(shards, name, by_turns))
    assert finding == (
        f"{name}, rank 1: cell 28 of the rank's cut axis is B group 1 (cell 0 of 6), config.json asks for B group 0 "
        "(cell 0 of 6)"
    )


# ---------------------------------------------------------------------------------------------- wrong ones


def sweep(*case: object) -> Any:
    return pytest.param(*case, marks=pytest.mark.sweep)


def verified(folder: Path, name: str, tp: int, rules: str) -> CheckResult:
    """What the forward check says of an architecture cut by its policy but for these rules."""
    (folder / "mine.yaml").write_text(f"name: mine\nextends: {architecture(name).policy}\nrules:\n  {rules}\n")
    save(architecture(name), folder / "source")
    run(plan_split(folder / "source", folder / "shards", tp, policy=str(folder / "mine.yaml")))
    report = verify(Request(folder / "shards", against=folder / "source", workers=1))
    return next(check for check in report.checks if check.name == "forward")


BY_GROUP = "mixer.norm: {rule: column, heads: G}"


def test_a_gated_norm_by_groups_is_right_where_ranks_divide_the_groups(tmp_path: Path) -> None:
    assert verified(tmp_path, "mamba2", 2, BY_GROUP).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("name", "tp", "rules", "layer"),
    [
        ("mamba2", 4, BY_GROUP, "mixer.norm"),  # two groups: the norm of one is over the heads of two ranks
        ("mamba2", 4, "mixer.norm: replicate", "mixer.out_proj"),  # that of half a group is another number
        ("mamba2", 2, "mixer.conv1d: {rule: column, heads: MH}", "mixer.norm"),  # x | B | C as one block
        ("mamba", 2, "mixer.in_proj: column", "mixer.x_proj"),  # x | z as one block
        ("mamba", 2, "mixer.x_proj: replicate", "mixer.x_proj"),
        ("zamba", 2, "mamba.in_proj: {rule: column, parts: [MH, MH]}", "mamba.out_proj"),  # x z x z as x | z
        sweep("qwen3_next", 2, "linear_attn.in_proj_ba: {rule: column, parts: 2}", "linear_attn.out_proj"),
        sweep("recurrent_gemma", 2, "temporal_block.linear_y: {rule: column, parts: 4}", "temporal_block.linear_out"),
        sweep("lfm2", 2, "conv.in_proj: column", "conv.out_proj"),
    ],
)
def test_a_wrong_cut_is_found_and_named(name: str, tp: int, rules: str, layer: str, tmp_path: Path) -> None:
    check = verified(tmp_path, name, tp, rules)
    assert check.verdict is Verdict.FAIL
    assert str(check.findings[0].layer).endswith(f"layers.0.{layer}")


@pytest.mark.parametrize(
    ("name", "tp", "changes", "refusal"),
    [
        ("zamba", 4, {}, r"2 units cannot be dealt to 4 ranks: a row rule may not replicate"),
        ("mamba2", 3, {"num_heads": 6, "hidden_size": 42}, r"2 units cannot be dealt to 3 ranks"),
        (
            "kimi_linear",
            4,
            {"linear_attn_config": {"num_heads": 4, "head_dim": 12}},
            r"heads do not divide an axis of 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, tp: int, changes: Mapping[str, Any], refusal: str, tmp_path: Path
) -> None:
    save(architecture(name, **changes), tmp_path / "source")
    with pytest.raises(PolicyError, match=refusal):
        plan_split(tmp_path / "source", tmp_path / "shards", tp)


# ---------------------------------------------------------------------------------------------- grids


def test_every_policy_but_those_of_shared_blocks_has_stages(tmp_path: Path) -> None:
    """Zamba's later layers use what is stored with an earlier one."""
    for number, found in enumerate(ARCHITECTURES):
        source = tmp_path / str(number)
        save(found, source)
        if found.model_type in ("zamba", "zamba2"):
            with pytest.raises(PolicyError, match="stages does not say where"):
                plan_split(source, tmp_path / "shards", Grid(Mesh(2, pp=2)))
        else:
            assert plan_split(source, tmp_path / "shards", Grid(Mesh(2, pp=2))).warnings == (), found.name


def test_what_predicts_one_more_word_goes_with_the_last_stage_and_what_sees_with_the_first() -> None:
    ends = {
        "qwen3_5": (
            ["model.visual.merger.norm.weight", "model.visual.blocks.0.attn.qkv.bias"],
            ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.norm.weight"],
        ),
        "nemotron_h": ([], ["mtp.layers.0.eh_proj.weight", "mtp.layers.1.mixer.experts.2.up_proj.weight"]),
    }
    layers = {"qwen3_5": "model.language_model.layers", "nemotron_h": "backbone.layers"}
    for name, (first, last) in ends.items():
        inner = [f"{layers[name]}.{number}.norm.weight" for number in (0, 1)]
        dealt = deal_stages(builtin_policies()[name].stages, name, dict.fromkeys([*first, *inner, *last], 1), 2)
        assert dealt == {**dict.fromkeys(first, (0,)), inner[0]: (0,), inner[1]: (1,), **dict.fromkeys(last, (1,))}


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("jamba", Grid(Mesh(2, ep=3, pp=2))),
        sweep("nemotron_h", Grid(Mesh(2, ep=3, pp=2))),
        sweep("granitemoehybrid", Grid(Mesh(2, ep=3))),
        sweep("qwen3_next", Grid(Mesh(2, ep=3, pp=2))),
        sweep("qwen3_5_moe", Grid(Mesh(2, ep=3, pp=2))),
        sweep("kimi_linear", Grid(Mesh(2, ep=3, pp=2))),
        sweep("lfm2_moe", Grid(Mesh(2, ep=3, pp=2))),
        sweep("falcon_h1", Grid(Mesh(2, pp=2))),
        sweep("xlstm", Grid(Mesh(2, pp=2))),
        sweep("rwkv", Grid(Mesh(2, pp=2))),
    ],
)
def test_groups_of_experts_and_stages(name: str, grid: Grid, tmp_path: Path) -> None:
    save(architecture(name), tmp_path / "source")
    run(plan_split(tmp_path / "source", tmp_path / "shards", grid))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "source", workers=1))
    assert report.verdict is Verdict.PASS, report
    assert next(check for check in report.checks if check.name == "forward").verdict is Verdict.PASS
