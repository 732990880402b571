"""Grids of ranks: whole experts in groups, layers in stages. What each rank holds is worked out again, slowly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny_models
from tests.architectures.decoders import FREE
from tests.build import load
from tpshard.checkpoint import Stored, open_full, open_shards
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_reshard, plan_split
from tpshard.errors import PolicyError, TpshardError, UsageError
from tpshard.layout import Layout
from tpshard.mesh import Grid, Mesh
from tpshard.stages import balanced
from tpshard.verify.grid_layout import check_layout_of_grid
from tpshard.verify.report import Report, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

LAYERS, EXPERTS = 3, 4
SIZES = FREE | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": LAYERS}
GPT_OSS = SIZES | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
POLICY = """
name: mixtral
extends: llama
vars: {E: num_local_experts}
rules:
  experts.*.{w1,w3}: {rule: column, experts: E}
  experts.*.w2: {rule: row, experts: E}
  block_sparse_moe.gate: replicate
---
name: gpt-oss
for: {model_type: gpt_oss}
extends: llama
rules:
  self_attn.sinks: {rule: column, heads: H}
  mlp.router: replicate
  mlp.experts.{gate_up_proj,gate_up_proj_bias}: {rule: column, dims: eio, unit: 2}
  mlp.experts.{down_proj,down_proj_bias}: {rule: row, dims: eio}
"""
GRIDS = {
    "groups": Grid(Mesh(tp=2, ep=2)),
    "whole experts": Grid(Mesh(tp=4), whole_experts=True),
    "whole experts in groups": Grid(Mesh(tp=2, ep=2), whole_experts=True),
    "stages and groups": Grid(Mesh(tp=2, ep=2, pp=2)),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy") / "experts.yaml"
    path.write_text(POLICY.replace("name: mixtral", "name: mixtral\nfor: {model_type: mixtral}"))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in (("mixtral", SIZES), ("gpt_oss", GPT_OSS)):
        config = transformers.AutoConfig.for_model(name, **sizes)
        tiny_models.build(config, tiny_models.word_head(config)).save_pretrained(folder / name)
    return {"mixtral": folder / "mixtral", "gpt_oss": folder / "gpt_oss"}


def check(report: Report, name: str) -> Any:
    return next(check for check in report.checks if check.name == name)


# ---------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_split_verify_merge(model: str, kind: str, models: dict[str, Path], policy: str, tmp_path: Path) -> None:
    run(plan_split(models[model], tmp_path / "shards", GRIDS[kind], policy))
    report = verify(Request(tmp_path / "shards", against=models[model], workers=1))
    assert {c.name: c.verdict for c in report.checks if c.name != "layout"} == dict.fromkeys(
        ("files", "weights", "forward", "backward", "generic", "self-test"), Verdict.PASS
    ), report
    assert check(report, "layout").verdict is not Verdict.FAIL, report
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    assert load(tmp_path / "merged/model.safetensors") == load(models[model] / "model.safetensors")


def test_what_each_rank_holds(models: dict[str, Path], policy: str, tmp_path: Path) -> None:
    """Two stages of two groups of two ranks: by hand, from the source's arrays."""
    run(plan_split(models["mixtral"], tmp_path / "shards", Grid(Mesh(2, ep=2, pp=2), layers=(2, 1)), policy))
    whole = {name: t.array() for name, t in load(models["mixtral"] / "model.safetensors").items()}
    for rank, file in enumerate(sorted((tmp_path / "shards").glob("rank-*"))):
        stage, group, place = rank // 4, rank // 2 % 2, rank % 2
        assert file.name == f"rank-0000{rank}-of-00008-pp{stage}-ep{group}-tp{place}.safetensors"
        own = {name: t.array() for name, t in load(file).items()}
        half = slice(place * 26, place * 26 + 26)  # of 52 channels
        wanted = {}
        for layer in (0, 1) if stage == 0 else (2,):
            for expert in (2 * group, 2 * group + 1):
                at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                wanted[f"{at}.w1.weight"] = whole[f"{at}.w1.weight"][half]
                wanted[f"{at}.w3.weight"] = whole[f"{at}.w3.weight"][half]
                wanted[f"{at}.w2.weight"] = whole[f"{at}.w2.weight"][:, half]
        assert {name for name in own if ".experts." in name} == set(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(own[name], array)
        ends = {"model.embed_tokens.weight"} if stage == 0 else {"model.norm.weight", "lm_head.weight"}
        assert {name for name in own if ".layers." not in name} == ends
        q_proj = f"model.layers.{stage * 2}.self_attn.q_proj.weight"
        np.testing.assert_array_equal(own[q_proj], whole[q_proj][place * 24 : place * 24 + 24])


def test_stacked_experts(models: dict[str, Path], policy: str, tmp_path: Path) -> None:
    """Group 1 has experts 2 and 3 of [4, 44, 104], its second rank the second half of their channels."""
    run(plan_split(models["gpt_oss"], tmp_path / "shards", Grid(Mesh(2, ep=2)), policy))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    own = load(tmp_path / "shards/rank-00003-of-00004-ep1-tp1.safetensors")
    whole = load(models["gpt_oss"] / "model.safetensors")
    np.testing.assert_array_equal(own[name].array(), whole[name].array()[2:, :, 52:])
    bias = "model.layers.1.mlp.experts.down_proj_bias"
    np.testing.assert_array_equal(own[bias].array(), whole[bias].array()[2:])


def test_from_one_grid_to_another(models: dict[str, Path], policy: str, tmp_path: Path) -> None:
    """The same bytes as splitting the source, whatever lies between."""
    run(plan_split(models["mixtral"], tmp_path / "a", GRIDS["stages and groups"], policy))
    for number, grid in enumerate((Grid(Mesh(1, pp=3)), Grid(Mesh(4), whole_experts=True), Grid(Mesh(2)))):
        run(plan_reshard(tmp_path / "a", tmp_path / f"re{number}", grid))
        run(plan_split(models["mixtral"], tmp_path / f"split{number}", grid, policy))
        for file in sorted((tmp_path / f"split{number}").glob("rank-*")):
            assert (tmp_path / f"re{number}" / file.name).read_bytes() == file.read_bytes()


def test_tied_words_are_on_the_first_and_the_last_stage(tmp_path: Path) -> None:
    tiny_models.save_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    run(plan_split(tmp_path / "tied", tmp_path / "shards", Grid(Mesh(2, pp=3))))
    layout = open_shards(tmp_path / "shards").tensors["model.embed_tokens.weight"].layout
    assert [shard is not None for shard in layout.shards] == [True, True, False, False, True, True]
    report = verify(Request(tmp_path / "shards", against=tmp_path / "tied", workers=1))
    assert report.verdict is Verdict.PASS, report
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    assert load(tmp_path / "merged/model.safetensors") == load(tmp_path / "tied/model.safetensors")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_stages_are_as_light_as_can_be(weights: list[int], extra: list[int]) -> None:
    """Against all ways there are."""
    if len(extra) > len(weights):
        return

    def ways(items: int, stages: int) -> list[list[int]]:
        if stages == 1:
            return [[items]]
        return [[own, *rest] for own in range(1, items - stages + 2) for rest in ways(items - own, stages - 1)]

    def heaviest(counts: list[int]) -> int:
        edges = np.cumsum([0, *counts])
        return max(e + sum(weights[a:b]) for e, a, b in zip(extra, edges, edges[1:], strict=False))

    found = balanced(weights, extra)
    assert sum(found) == len(weights)
    assert min(found) >= 1
    assert heaviest(found) == min(map(heaviest, ways(len(weights), len(extra))))


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (Grid(Mesh(2, ep=3)), PolicyError, r"experts\.0\.w1\.weight: 4 experts cannot be dealt to 3 groups"),
        (Grid(Mesh(2, pp=4)), UsageError, "--pp 4: there are 3 layers"),
        (Grid(Mesh(2, pp=2), layers=(1, 1)), UsageError, r"--stages 1\+1 is 2 layers, there are 3"),
        (Grid(Mesh(2, pp=2), layers=(3,)), UsageError, "--stages gives layers for 1 stages, --pp is 2"),
        (Grid(Mesh(64, ep=64, pp=2)), UsageError, "is 8192 ranks, at most 4096 are written"),
    ],
)
def test_refusals(
    grid: Grid, error: type[TpshardError], message: str, models: dict[str, Path], policy: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        plan_split(models["mixtral"], tmp_path / "shards", grid, policy)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    tiny_models.save_model("llama", tmp_path / "source")
    with pytest.raises(PolicyError, match="policy llama knows no experts in this checkpoint"):
        plan_split(tmp_path / "source", tmp_path / "shards", Grid(Mesh(2, ep=2)))


def test_a_policy_must_say_where_everything_belongs(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "name: p\nextends: llama\ndefault: replicate\nstages: {layers: layers, first: norm}\n"
    )
    with pytest.raises(PolicyError, match=r"stages does not say where lm_head\.weight belongs"):
        plan_split(models["mixtral"], tmp_path / "shards", Grid(Mesh(2, pp=2)), str(tmp_path / "p.yaml"))
    (tmp_path / "q.yaml").write_text("name: q\ndefault: replicate\nrules: {lm_head: replicate}\n")
    with pytest.raises(PolicyError, match="policy q says nothing of pipeline stages"):
        plan_split(models["mixtral"], tmp_path / "shards", Grid(Mesh(2, pp=2)), str(tmp_path / "q.yaml"))


# ---------------------------------------------------------------------------------------------- wrong places are seen


def moved(ranks: list[int]) -> Callable[[Layout], Layout]:
    """Rank r has what ``ranks[r]`` should have."""
    return lambda layout: Layout(layout.shape, tuple(layout.shards[rank] for rank in ranks))


OTHER_STAGE = [4, 5, 6, 7, 0, 1, 2, 3]
OTHER_GROUP = [2, 3, 0, 1, 6, 7, 4, 5]


@pytest.mark.parametrize(
    ("part_of_name", "ranks", "says"),
    [
        ("layers.0.input_layernorm", OTHER_STAGE, "is on stages 1, its layer on stage 0"),
        ("layers.0.", OTHER_STAGE, "is on stage 0, a layer before it on stage 1"),
        ("embed_tokens", OTHER_STAGE, "is on stages 1, belongs on 0"),
        ("lm_head", OTHER_STAGE, "is on stages 0, belongs on 1"),
        ("layers.2.block_sparse_moe.experts.0.w1", OTHER_GROUP, "expert 0 of 4 is on ranks 2-3 of its stage"),
        ("layers.2.self_attn.q_proj", [0, 1, 3, 2, 4, 5, 7, 6], "group 1 does not hold what group 0 holds"),
    ],
)
def test_the_layout_check_names_what_is_out_of_place(
    part_of_name: str, ranks: list[int], says: str, models: dict[str, Path], policy: str, tmp_path: Path
) -> None:
    run(plan_split(models["mixtral"], tmp_path / "shards", GRIDS["stages and groups"], policy))
    shards = open_shards(tmp_path / "shards")
    as_llama = dataclasses.replace(shards, config={**shards.config, "model_type": "llama"})

    def change(tensor: Stored) -> Stored:
        return dataclasses.replace(tensor, layout=moved(ranks)(tensor.layout))

    tensors = {n: change(t) if part_of_name in n else t for n, t in as_llama.tensors.items()}
    result = check_layout_of_grid(dataclasses.replace(as_llama, tensors=tensors))
    assert says in " / ".join(map(str, result.findings)), result


def test_a_group_that_computes_with_other_experts_is_seen(models: dict[str, Path], policy: str, tmp_path: Path) -> None:
    """Split by a policy that takes one expert for another: everything can be undone, only the model notices."""
    source = open_full(models["mixtral"])
    conversion = plan_split(models["mixtral"], tmp_path / "shards", GRIDS["groups"], policy)
    items = tuple(
        dataclasses.replace(item, want=moved([1, 0, 2, 3])(item.want)) if "experts.1.w2" in item.stored.name else item
        for item in conversion.plan.items
    )
    run(dataclasses.replace(conversion, plan=dataclasses.replace(conversion.plan, items=items)))
    report = verify(Request(tmp_path / "shards", against=source.folder, workers=1))
    assert check(report, "weights").verdict is Verdict.PASS
    assert check(report, "forward").verdict is Verdict.FAIL
