"""Policies and layout descriptions of mixtures of experts and latent attention: what each rank holds, worked by hand;
whole experts dealt; experts that are cut otherwise than their siblings."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.architectures import Architecture
from tests.architectures.experts import ARCHITECTURES
from tests.build import load
from tests.planting import reverse, whole
from tests.proof import save
from tests.test_layout_check import changed
from tests.test_policies import rows
from tpshard.checkpoint import Checkpoint, open_full, open_shards
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.layout import Layout, Shard, Span
from tpshard.library import choose_policy
from tpshard.mesh import Grid, Mesh
from tpshard.verify.families import FAMILIES, are_tied, sizes_of
from tpshard.verify.grid_layout import check_layout_of_grid
from tpshard.verify.layout import check_layout
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

BY_NAME = {found.name: found for found in ARCHITECTURES}
Arrays = Mapping[str, Any]


def arrays_of(folder: Path, name: str, tp: int) -> tuple[Arrays, list[Arrays]]:
    """The source's tensors and each rank's, as arrays."""
    save(BY_NAME[name], folder / "source")
    run(plan_split(folder / "source", folder / "shards", tp))
    files = [folder / "source/model.safetensors", *sorted((folder / "shards").glob("rank-*.safetensors"))]
    made = [{key: tensor.array() for key, tensor in load(file).items()} for file in files]
    return made[0], made[1:]


# ---------------------------------------------------------------------------------------------- worked by hand


def test_gate_and_up_in_turn(tmp_path: Path) -> None:
    """52 channels on four ranks, g u g u: rank 1 has channels 13 to 25, columns 26 to 51, and those rows of down."""
    full, ranks = arrays_of(tmp_path, "gpt_oss", 4)
    at = "model.layers.1.mlp.experts"
    np.testing.assert_array_equal(ranks[1][f"{at}.gate_up_proj"], full[f"{at}.gate_up_proj"][:, :, 26:52])
    np.testing.assert_array_equal(ranks[1][f"{at}.gate_up_proj_bias"], full[f"{at}.gate_up_proj_bias"][:, 26:52])
    np.testing.assert_array_equal(ranks[1][f"{at}.down_proj"], full[f"{at}.down_proj"][:, 13:26])
    np.testing.assert_array_equal(ranks[1][f"{at}.down_proj_bias"], full[f"{at}.down_proj_bias"])  # added once
    sinks = "model.layers.0.self_attn.sinks"
    np.testing.assert_array_equal(ranks[3][sinks], full[sinks][6:8])


def test_gate_and_up_one_after_the_other_in_a_stack(tmp_path: Path) -> None:
    """52 channels on eight ranks, 7 for the first four and then 6: rank 4 has 28 to 33 of gate, and of up from 52 on."""
    full, ranks = arrays_of(tmp_path, "granitemoe", 8)
    at = "model.layers.0.block_sparse_moe"
    mine = rows((28, 34), (80, 86))
    np.testing.assert_array_equal(ranks[4][f"{at}.input_linear.weight"], full[f"{at}.input_linear.weight"][:, mine])
    down = f"{at}.output_linear.weight"
    np.testing.assert_array_equal(ranks[4][down], full[down][:, :, 28:34])


def test_experts_one_after_another_in_an_axis(tmp_path: Path) -> None:
    """Five experts of 52 channels: rank 3 of 4 has the last 13 of each, the way down alike."""
    full, ranks = arrays_of(tmp_path, "dbrx", 4)
    mine = rows(*((52 * expert + 39, 52 * expert + 52) for expert in range(5)))
    for name in ("w1", "v1", "w2"):
        key = f"transformer.blocks.1.ffn.experts.mlp.{name}"
        np.testing.assert_array_equal(ranks[3][key], full[key][mine])


def test_latent_attention(tmp_path: Path) -> None:
    """Twelve heads; up from the latent each has 10 cells of key and 9 of value, a query 10 plain and 6 rotary ones.
    Rank 1 of 3 has heads 4 to 7."""
    full, ranks = arrays_of(tmp_path, "deepseek_v3", 3)
    at = "model.layers.0.self_attn"
    np.testing.assert_array_equal(ranks[1][f"{at}.kv_b_proj.weight"], full[f"{at}.kv_b_proj.weight"][4 * 19 : 8 * 19])
    np.testing.assert_array_equal(ranks[1][f"{at}.q_b_proj.weight"], full[f"{at}.q_b_proj.weight"][4 * 16 : 8 * 16])
    np.testing.assert_array_equal(ranks[1][f"{at}.o_proj.weight"], full[f"{at}.o_proj.weight"][:, 4 * 9 : 8 * 9])
    for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_a_layernorm", "kv_a_layernorm"):
        np.testing.assert_array_equal(ranks[1][f"{at}.{name}.weight"], full[f"{at}.{name}.weight"])


# ---------------------------------------------------------------------------------------------- names


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(BY_NAME["deepseek_v3"], source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    assert choose_policy("auto", open_full(source).config).name == "deepseek"
    run(plan_split(source, tmp_path / "shards", 4))
    report = verify(Request(tmp_path / "shards", against=source, workers=1))
    assert report.verdict is Verdict.PASS, report


@pytest.mark.parametrize("model_type", sorted({found.model_type for found in ARCHITECTURES} - {"dbrx"}))
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    """What config.json may leave out: tied words, and the size of a head where all are of one size."""
    given = {"hidden_size": 60, "num_attention_heads": 6}
    config = transformers.AutoConfig.for_model(model_type, **given)
    assert are_tied({"model_type": model_type}) is config.tie_word_embeddings
    sizes = sizes_of({"model_type": model_type, **given})
    assert sizes
    if "kv_b_proj" not in FAMILIES[model_type]:
        assert sizes.head == (getattr(config, "head_dim", None) or 10)


# ---------------------------------------------------------------------------------------------- whole experts


@functools.cache
def shards_of(name: str, tp: int = 2, ep: int = 1, pp: int = 1, whole_experts: bool = False) -> Checkpoint:
    """Of a model with six experts; only what the manifest says of it is used after its folder is gone."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "shards")
        save(with_six_experts(BY_NAME[name]), source)
        run(plan_split(source, target, Grid(Mesh(tp=tp, ep=ep, pp=pp), whole_experts)))
        return open_shards(target)


def with_six_experts(found: Architecture) -> Architecture:
    counts = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"} & set(found.sizes)
    return dataclasses.replace(found, sizes={**found.sizes, **dict.fromkeys(counts, 6)})


def said(shards: Checkpoint) -> list[str]:
    result = check_layout_of_grid(shards)
    assert result.verdict is (Verdict.FAIL if result.findings else Verdict.PASS), result
    return [str(finding) for finding in result.findings]


GRIDS = {
    "groups": {"ep": 2},
    "whole experts": {"whole_experts": True},
    "groups and stages": {"ep": 3, "pp": 2},
}
KINDS = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "jetmoe", "llama4_text", "olmoe")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", KINDS)
def test_whole_experts_are_where_they_belong(name: str, grid: str) -> None:
    assert said(shards_of(name, **GRIDS[grid])) == []


@pytest.mark.parametrize("name", ["jetmoe", "gpt_oss"])
def test_a_model_of_whole_experts_runs_and_merges(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(with_six_experts(BY_NAME[name]), source)
    run(plan_split(source, tmp_path / "shards", Grid(Mesh(tp=2), whole_experts=True)))
    report = verify(Request(tmp_path / "shards", against=source, workers=1))
    assert report.verdict is Verdict.PASS, report
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    assert load(tmp_path / "merged/model.safetensors") == load(source / "model.safetensors")


def test_a_router_is_no_stack_of_experts() -> None:
    """It has a row for each, but every group needs all of them."""

    def dealt(layout: Layout) -> Layout:
        first, second = (Shard((3, 44), ((Span(a, a + 3),), (Span(0, 44),))) for a in (0, 3))
        return Layout(layout.shape, (first, first, second, second))

    shards = shards_of("mixtral", ep=2)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert said(changed(shards, name, dealt)) == [
        f"{name}: group 1 does not hold what group 0 holds, and it is of no expert"
    ]


# ---------------------------------------------------------------------------------------------- siblings


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_experts_are_cut_as_their_siblings(name: str) -> None:
    shards = shards_of(name)
    layer = f"model.layers.1.{'block_sparse_moe' if name == 'mixtral' else 'mlp'}.experts.4"
    told = [str(finding) for finding in check_layout(changed(shards, f"{layer}.", whole)).findings]
    tensors = [tensor for tensor in shards.tensors if tensor.startswith(f"{layer}.")]
    assert told == [f"{tensor}: is cut otherwise than the same layer of expert 0" for tensor in tensors]


def test_an_expert_in_another_rank_order_is_found() -> None:
    shards = changed(shards_of("qwen2_moe"), "layers.0.mlp.experts.2.down_proj", reverse)
    assert said(shards) == [
        "model.layers.0.mlp.experts.2.down_proj.weight, rank 0: rank order [1, 0] differs from gate_proj: holds channels "
        "19 to 37, must hold 0 to 18"
    ]


def test_a_wrong_count_of_channels_is_of_the_experts() -> None:
    """The dense layers and the experts have numbers of their own in config.json."""
    shards = shards_of("glm4_moe")
    wrong = dataclasses.replace(shards, config={**shards.config, "moe_intermediate_size": 40})
    assert {text.partition(": ")[2] for text in said(wrong)} == {
        f"has 38 cells along axis {axis}, config.json says 40 channels: 40" for axis in (0, 1)
    }
    assert all(".experts." in text for text in said(wrong))
