"""Adapters of real PEFT: cut as their base, verified merged into it, and back byte for byte."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import adapters
from tests.adapters import Case
from tests.build import tree
from tests.planting import along, reverse
from tests.tampering import Folder
from tpshard import api
from tpshard.adapter_folder import read_base
from tpshard.checkpoint import open_shards
from tpshard.cli.main import _run
from tpshard.conversion import run
from tpshard.convert import plan_adapter_split, plan_reshard
from tpshard.layout import Box, Layout
from tpshard.plan import Item
from tpshard.verify.adapter_checks import merged_weights
from tpshard.verify.adapter_weights import own_shape
from tpshard.verify.model_checks import ModelRequest
from tpshard.verify.report import Report, Verdict
from tpshard.verify.values import WHOLE, StoredWeights

Numbers = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """A folder with base, adapter and merged model of a case, made once."""
    folders: dict[str, Path] = {}

    def make(case: Case) -> Path:
        if str(case) not in folders:
            folders[str(case)] = tmp_path_factory.mktemp("adapter")
            adapters.make(case, folders[str(case)])
        return folders[str(case)]

    return make


def verify(folder: Path, at: Path, **options: Any) -> Report:
    return api.verify(folder, against=at / "adapter", base=at / "base", workers=1, **options)


def failing(report: Report) -> dict[str, str]:
    return {c.name: "; ".join(map(str, c.findings)) for c in report.checks if c.verdict is Verdict.FAIL}


# ---------------------------------------------------------------------------------------------- right


@pytest.mark.parametrize("case", adapters.CASES, ids=str)
def test_each_rank_holds_its_part_of_what_peft_merges(case: Case, made: Callable[[Case], Path], tmp_path: Path) -> None:
    """The model that PEFT merged, cut by the policy, against each rank's own A and B in its own part of the base."""
    at = made(case)
    api.split(at / "adapter", tmp_path / "shards", tp=case.tp, base=at / "base")
    api.split(at / "merged", tmp_path / "merged", tp=case.tp)
    want = open_shards(tmp_path / "merged")
    with (
        StoredWeights(open_shards(tmp_path / "shards"), None) as own,
        StoredWeights(want, None) as merged,
        StoredWeights(open_base(at), None) as base,
    ):
        shards = open_shards(tmp_path / "shards")
        weights, wrong = merged_weights(shards, own, read_base(at / "base"), base, ModelRequest())
        assert not wrong
        assert set(weights.names) == set(want.tensors)
        for name in weights.names:
            for holder in (WHOLE, *range(case.tp)):
                shape = own_shape(weights, name, holder)
                box = Box((0,) * len(shape), shape)
                torch.testing.assert_close(
                    weights.read(name, holder, box).double(), merged.read(name, holder, box), atol=1e-12, rtol=1e-12
                )


def open_base(at: Path) -> Any:
    checkpoint = read_base(at / "base").checkpoint
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize("case", [adapters.LLAMA, adapters.PHI3, adapters.GPT2, adapters.CASES[1]], ids=str)
def test_a_rank_can_merge_its_own_files(case: Case, made: Callable[[Case], Path], tmp_path: Path) -> None:
    """With nothing but the files of one rank, as an engine would: W + s B A is that rank's of the merged model."""
    at = made(case)
    api.split(at / "adapter", tmp_path / "adapter", tp=case.tp, base=at / "base")
    for source in ("base", "merged"):
        api.split(at / source, tmp_path / source, tp=case.tp)
    for rank in range(case.tp):
        name = f"rank-{rank:05d}-of-{case.tp:05d}.safetensors"
        lora, base, want = (load_file(tmp_path / part / name) for part in ("adapter", "base", "merged"))
        merged = 0
        for a in (key for key in lora if key.endswith("lora_A.weight")):
            layer = a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = lora[a.replace("lora_A", "lora_B")] @ lora[a] * adapters.ALPHA / adapters.RANK
            delta = delta.T if case.model == "gpt2" else delta
            (key,) = [key for key in base if f"{layer}.weight".endswith(key)]
            torch.testing.assert_close(base[key].double() + delta, want[key], atol=1e-12, rtol=1e-12)
            merged += 1
        assert merged == len(lora) // 2


@pytest.mark.parametrize("case", adapters.CASES, ids=str)
def test_verify_proves_it_and_merge_gives_it_back(case: Case, made: Callable[[Case], Path], tmp_path: Path) -> None:
    at = made(case)
    api.split(at / "adapter", tmp_path / "shards", tp=case.tp, base=at / "base")
    report = verify(tmp_path / "shards", at)
    assert [(c.name, c.verdict.name, c.unproven) for c in report.checks] == [
        (name, "PASS", None) for name in ("files", "weights", "layout", "forward", "backward", "generic", "self-test")
    ]
    forward = report.checks[3]
    assert "with the adapter merged into the base's own weights" in forward.notes
    api.merge(tmp_path / "shards", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(at / "adapter")


def test_reshard_needs_no_base(made: Callable[[Case], Path], tmp_path: Path) -> None:
    at = made(adapters.GPT2)
    api.split(at / "adapter", tmp_path / "three", tp=3, base=at / "base")
    api.split(at / "adapter", tmp_path / "two", tp=2, base=at / "base" / "config.json")
    api.reshard(tmp_path / "three", tmp_path / "again", tp=2)
    assert tree(tmp_path / "again") == tree(tmp_path / "two")
    carried = {record.name for record in open_shards(tmp_path / "two").manifest.carried}  # type: ignore[union-attr]
    assert {"adapter_config.json", "tpshard-base-config.json"} <= carried


def test_random_weights_stand_for_a_base_that_is_not_there(made: Callable[[Case], Path], tmp_path: Path) -> None:
    at = made(adapters.BERT)
    api.split(at / "adapter", tmp_path / "shards", tp=2, base=at / "base")
    report = api.verify(tmp_path / "shards", level="forward")
    assert report.verdict is Verdict.PASS
    assert any("random weights" in note for note in report.checks[3].notes)


def test_a_fresh_adapter_hides_nothing(tmp_path: Path) -> None:
    """PEFT begins with B = 0: the merged weights are the base's whatever the cut. Generic numbers show it."""
    case = adapters.PHI3
    adapters.make(case, tmp_path, zero_b=True)
    plant_layout("qkv_proj.lora_B", lambda layout: along(0, [0, 50, 100])(layout), tmp_path, tmp_path / "shards")
    found = failing(verify(tmp_path / "shards", tmp_path))
    assert "forward" not in found
    assert "qkv_proj" in found["generic"]


def test_names_that_are_others_on_disk(tmp_path: Path) -> None:
    """ViT's are changed when it is loaded, and PEFT's are those of the module; the policy has those on disk."""
    adapters.make_vit(tmp_path)
    (tmp_path / "vit.yaml").write_text(VIT)
    words = ["split", *(str(tmp_path / part) for part in ("adapter", "shards")), "--tp", "2", "--policy"]
    words += [str(tmp_path / "vit.yaml"), "--base"]
    assert _run([*words, str(tmp_path / "base" / "config.json")]) == 2  # it has no names
    assert _run([*words, str(tmp_path / "base")]) == 0
    found = {check.name: check.verdict.name for check in verify(tmp_path / "shards", tmp_path).checks}
    assert (found["forward"], found["self-test"]) == ("PASS", "PASS")
    api.reshard(tmp_path / "shards", tmp_path / "three", tp=3)
    api.merge(tmp_path / "three", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "adapter")


VIT = """\
name: my-vit
for: {model_type: vit}
vars: {H: num_attention_heads}
rules:
  attention.attention.{query,key,value}: {rule: column, heads: H}
  attention.output.dense: {rule: row, heads: H}
  intermediate.dense: column
  layer.*.output.dense: row
  "{cls_token,position_embeddings,patch_embeddings.projection,layernorm_before,layernorm_after}": replicate
  "{vit.layernorm,classifier}": replicate
"""


def test_an_adapter_of_any_module(tmp_path: Path) -> None:
    """Without transformers and config.json: a policy file, and a function that makes the module."""
    adapters.make_any(tmp_path)
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "name: net\nrules:\n  words: {rule: row, dims: io}\n  up: column\n  down: row\n"
        "  head: {rule: column, gather: true}\n  unused: {rule: column, gather: true}\n  norm: replicate\n"
    )
    api.split(tmp_path / "adapter", tmp_path / "shards", tp=2, base=tmp_path / "base", policy=str(policy))
    found = {check.name: check for check in verify(tmp_path / "shards", tmp_path, model="tests.a_model:build").checks}
    assert {name for name, check in found.items() if check.verdict is not Verdict.PASS} == {"layout"}  # no family
    assert found["self-test"].covered["planted faults"] > 0
    api.merge(tmp_path / "shards", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "adapter")


# ---------------------------------------------------------------------------------------------- wrong


def plant_layout(part: str, change: Callable[[Layout], Layout], at: Path, target: Path, tp: int = 2) -> None:
    """Split with the layout of all tensors whose name holds ``part`` changed, and recorded so."""
    conversion = plan_adapter_split(at / "adapter", target, tp, at / "base")
    hit = {item.stored.name for item in conversion.plan.items if part in item.stored.name}
    assert hit
    items = (
        Item(item.stored, change(item.want)) if item.stored.name in hit else item for item in conversion.plan.items
    )
    run(dataclasses.replace(conversion, plan=dataclasses.replace(conversion.plan, items=tuple(items))))


FAULTS: dict[str, tuple[Case, str, Callable[[Layout], Layout], set[str], str]] = {
    "W64, B of a fused layer in one piece": (adapters.PHI3, "qkv_proj.lora_B", along(0, [0, 50, 100]), {"layout", "forward"}, "qkv_proj.lora_B"),
    "B's rows of two ranks exchanged": (adapters.LLAMA, "1.self_attn.q_proj.lora_B", reverse, {"layout", "forward"}, "layers.1.self_attn.q_proj.lora_B"),
    "A's columns of two ranks exchanged": (adapters.LLAMA, "1.mlp.down_proj.lora_A", reverse, {"layout", "forward"}, "layers.1.mlp.down_proj.lora_A"),
    "A of a row layer cut along the rank": (adapters.LLAMA, "o_proj.lora_A", along(0, [0, 3, 5]), {"layout", "forward"}, "o_proj.lora_A"),
    "A of a column layer cut along the rank": (adapters.LLAMA, "q_proj.lora_A", along(0, [0, 3, 5]), {"layout", "forward"}, "q_proj.lora_A.weight: is cut along axis 0, the adapter's rank"),
    "A of a column layer cut": (adapters.LLAMA, "up_proj.lora_A", along(1, [0, 24, 48]), {"layout", "forward"}, "up_proj.lora_A"),
    "A of a row layer left whole": (adapters.GPT2, "mlp.c_proj.lora_A", lambda layout: Layout.replicated(layout.shape, layout.ranks), {"layout", "forward"}, "mlp.c_proj.lora_A"),
    "B cut inside the heads": (adapters.LLAMA, "v_proj.lora_B", along(0, [0, 7, 20]), {"layout", "forward"}, "v_proj.lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_layout_is_found_and_named(name: str, made: Callable[[Case], Path], tmp_path: Path) -> None:
    """Each merges back bit for bit."""
    case, part, change, checks, named = FAULTS[name]
    at = made(case)
    plant_layout(part, change, at, tmp_path / "shards", case.tp)
    found = failing(verify(tmp_path / "shards", at, level="forward"))
    assert checks <= set(found), found
    assert named in found["layout"]
    assert part.rpartition(".lora")[0] in found["forward"]
    assert not {"files", "weights"} & set(found)
    api.merge(tmp_path / "shards", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(at / "adapter")


def test_bytes_of_two_ranks_exchanged(made: Callable[[Case], Path], tmp_path: Path) -> None:
    """With all digests made to agree."""
    at = made(adapters.LLAMA)
    api.split(at / "adapter", tmp_path / "shards", tp=2, base=at / "base")
    folder = Folder(tmp_path / "shards")
    folder.exchange_ranks(folder.find("layers.0.mlp.up_proj.lora_B.weight"), 0, 1)
    folder.reseal()
    found = failing(verify(tmp_path / "shards", at, level="forward"))
    assert set(found) == {"weights", "forward"}
    assert "layers.0.mlp.up_proj.lora_B" in found["weights"]
    assert "layers.0.mlp" in found["forward"]


@pytest.mark.parametrize("name", ["adapter_config.json", "tpshard-base-config.json"])
@pytest.mark.parametrize("text", [None, "{", '{"peft_type": "IA3"}'])
def test_damaged_configs_are_findings(
    name: str, text: str | None, made: Callable[[Case], Path], tmp_path: Path
) -> None:
    api.split(made(adapters.LLAMA) / "adapter", tmp_path / "shards", tp=2, base=made(adapters.LLAMA) / "base")
    path = tmp_path / "shards" / name
    path.unlink() if text is None else path.write_text(text)
    report = api.verify(tmp_path / "shards", level="layout")
    assert name in failing(report)["files"]
    assert report.checks[-1].verdict is not Verdict.PASS


def test_another_alpha(made: Callable[[Case], Path], tmp_path: Path) -> None:
    at = made(adapters.LLAMA)
    api.split(at / "adapter", tmp_path / "shards", tp=2, base=at / "base")
    path = tmp_path / "shards" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
    found = failing(verify(tmp_path / "shards", at, level="weights"))
    assert "adapter_config.json" in found["files"]
    assert "adapter_config.json" in found["weights"]


# ---------------------------------------------------------------------------------------------- refused


def change_config(at: Path, **keys: Any) -> None:
    path = at / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def narrower_base(at: Path) -> None:
    from tests import tiny_models

    shutil.rmtree(at / "base")
    tiny_models.save_model("llama", at / "base", intermediate_size=56)


REFUSED: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "another base": (narrower_base, 3, "mlp.down_proj: A and B make [48, 52], the base's model.layers.0.mlp.down_proj.weight is [48, 56]"),
    "no config": (lambda at: (at / "adapter/adapter_config.json").unlink(), 3, "holds no adapter_config.json"),
    "no weights": (lambda at: (at / "adapter/adapter_model.safetensors").unlink(), 3, "holds no adapter_model.safetensors"),
    "a pickle": (lambda at: (at / "adapter/adapter_model.safetensors").rename(at / "adapter/adapter_model.bin"), 3, "pickles are not read"),
    "IA3": (lambda at: change_config(at, peft_type="IA3"), 3, "peft_type is IA3, only LORA is cut"),
    "stacked experts": (lambda at: change_config(at, target_parameters=["experts.gate_up_proj"]), 3, "target_parameters is set"),
    "another rank": (lambda at: change_config(at, r=6), 3, "A is [5, 52] and B [48, 5], adapter_config.json says rank 6"),
    "a rank that is text": (lambda at: change_config(at, r="5"), 3, "r is '5', not a whole number from 1"),
    "alpha NaN": (lambda at: change_config(at, lora_alpha=math.nan), 3, "NaN"),
    "a pattern that is none": (lambda at: change_config(at, rank_pattern={"(": 3}), 3, "rank_pattern: '(' is no regular expression"),
    "DoRA without magnitudes": (lambda at: change_config(at, use_dora=True), 3, "has no lora_magnitude_vector, use_dora is True"),
    "no config of the base": (lambda at: (at / "base/config.json").unlink(), 2, "there is no config.json to pick a policy by"),
    "no base": (lambda at: shutil.rmtree(at / "base"), 3, "base: is not there"),
    "a file in the way": (lambda at: (at / "adapter/tpshard-base-config.json").write_text("{}"), 3, "holds a file called tpshard-base-config.json"),
    "nothing for a target": (lambda at: (at / "base/config.json").write_text('{"model_type": "gpt2", "n_head": 6}'), 2, "has no rule for"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(
    name: str, made: Callable[[Case], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the numbers, the right exit code, and nothing written."""
    change, code, said = REFUSED[name]
    at = tmp_path / "own"
    shutil.copytree(made(adapters.LLAMA), at)
    change(at)
    words = ["split", str(at / "adapter"), str(tmp_path / "shards"), "--tp", "2", "--base", str(at / "base")]
    assert _run(words) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("more", [["--ep", "2"], ["--pp", "2"]])
def test_a_grid_is_refused(
    more: list[str], made: Callable[[Case], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = made(adapters.LLAMA)
    words = ["split", str(at / "adapter"), str(tmp_path / "shards"), "--tp", "2", "--base", str(at / "base"), *more]
    assert _run(words) == 2
    assert "an adapter is cut for tensor parallelism alone" in capsys.readouterr().err


def test_a_base_for_a_model(made: Callable[[Case], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(made(adapters.LLAMA) / "base")
    assert _run(["split", base, str(tmp_path / "shards"), "--tp", "2", "--base", base]) == 3
    assert "--base is for adapters; leave it out for a model" in capsys.readouterr().err
    api.split(base, tmp_path / "shards", tp=2)
    assert _run(["verify", str(tmp_path / "shards"), "--base", base]) == 2
    assert "holds no adapter's shards" in capsys.readouterr().err


def test_another_base_for_verify(
    made: Callable[[Case], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = made(adapters.LLAMA)
    api.split(at / "adapter", tmp_path / "shards", tp=2, base=at / "base")
    shutil.copytree(at / "base", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    assert _run(["verify", str(tmp_path / "shards"), "--base", str(tmp_path / "other")]) == 3
    assert "is not the base that the adapter was cut by: rms_norm_eps is 0.5" in capsys.readouterr().err


def test_an_adapter_without_its_base(
    made: Callable[[Case], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["split", str(made(adapters.LLAMA) / "adapter"), str(tmp_path / "shards"), "--tp", "2"]
    assert _run(words) == 3
    assert (
        "holds an adapter (adapter_config.json), not a model (tpshard split takes it with --base MODEL)"
        in capsys.readouterr().err
    )


def test_a_plan_is_made_without_reading(made: Callable[[Case], Path], tmp_path: Path) -> None:
    at = made(adapters.LLAMA)
    conversion = plan_adapter_split(at / "adapter", tmp_path / "shards", 2, at / "base")
    of_q = {
        item.stored.name: item.want for item in conversion.plan.items if "layers.0.self_attn.q_proj" in item.stored.name
    }
    held = [[tuple(run) for run, ranks in layout.owners(0) if 0 in ranks] for _, layout in sorted(of_q.items())]
    assert held == [[(0, 5)], [(0, 30)]]
    run(conversion)
    assert plan_reshard(tmp_path / "shards", tmp_path / "one", 1).plan.ranks == 1
    assert np.prod(conversion.plan.items[0].stored.shape) > 0


# ---------------------------------------------------------------------------------------------- not proven


def test_an_adapter_of_a_tied_head_is_cut_but_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's head is its embedding, and PEFT adapts the head alone."""
    adapters.make(Case("gpt2", 2, ["lm_head", "c_attn"], {"fan_in_fan_out": True}), tmp_path)
    words = [
        "split",
        str(tmp_path / "adapter"),
        str(tmp_path / "shards"),
        "--tp",
        "2",
        "--base",
        str(tmp_path / "base"),
    ]
    assert _run(words) == 0
    assert "not in the base under this name" in capsys.readouterr().err
    forward = verify(tmp_path / "shards", tmp_path).checks[3]
    assert "the base has no tensor lm_head.weight" in str(forward.unproven)


def test_a_base_in_shards_will_do(made: Callable[[Case], Path], tmp_path: Path) -> None:
    at = made(adapters.PHI3)
    api.split(at / "base", tmp_path / "base", tp=2)
    api.split(at / "adapter", tmp_path / "shards", tp=2, base=tmp_path / "base")
    report = api.verify(tmp_path / "shards", base=tmp_path / "base", level="forward")
    assert report.verdict is Verdict.PASS
    assert "with the adapter merged into the base's own weights" in report.checks[3].notes


def test_several_processes_are_refused(made: Callable[[Case], Path], tmp_path: Path) -> None:
    from tpshard.errors import UsageError
    from tpshard.launch import Launch
    from tpshard.verify.request import Request
    from tpshard.verify.run import verify as run_checks

    api.split(made(adapters.LLAMA) / "adapter", tmp_path / "shards", tp=2, base=made(adapters.LLAMA) / "base")
    with pytest.raises(UsageError, match="adapters are verified in one process"):
        run_checks(Request(tmp_path / "shards", launch=Launch(0, 2, 0, "127.0.0.1", 1)))
