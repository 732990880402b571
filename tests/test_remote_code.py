"""Policies for architectures whose code is not in transformers, held against small models of the same names and orders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import remote_models
from tests.build import load
from tests.proof import CHECKS
from tests.remote_models import REMOTE
from tpshard.assignment import match_all
from tpshard.checkpoint import open_full
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.library import builtin_policies, choose_policy
from tpshard.verify.families import FAMILIES
from tpshard.verify.report import Report, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

TP = {"qwen": (2, 3), "internlm2": (2, 4), "baichuan": (4, 3), "chatglm": (2, 8), "exaone": (4, 8)}


def save(model_type: str, folder: Path) -> None:
    """The model on disk, random everywhere: no zero bias, no norm of ones."""
    folder.mkdir()
    config = remote_models.config_of(model_type)
    torch.manual_seed(0)
    model, _ = remote_models.build(config)
    state = {name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def verified(folder: Path, tp: int, policy: str = "auto") -> Report:
    run(plan_split(folder / "source", folder / "shards", tp, policy))
    request = Request(folder / "shards", against=folder / "source", factory="tests.remote_models:build", workers=1)
    return verify(request)


def test_each_remote_policy_is_here() -> None:
    ours = {name for name, policy in builtin_policies().items() if policy.mark.file == "remote_code.yaml"}
    assert ours == set(REMOTE) == set(TP)
    assert all(builtin_policies()[name].applies_to["model_type"] == (name,) for name in ours)


@pytest.mark.parametrize(("model_type", "tp"), [(kind, tp) for kind in TP for tp in TP[kind]])
def test_split_verify_merge(model_type: str, tp: int, tmp_path: Path) -> None:
    save(model_type, tmp_path / "source")
    report = verified(tmp_path, tp)
    verdicts = {check.name: check.verdict for check in report.checks}
    known = Verdict.PASS if model_type in FAMILIES else Verdict.INCONCLUSIVE
    assert verdicts == dict.fromkeys(CHECKS, Verdict.PASS) | {"layout": known}, report
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    assert load(tmp_path / "merged/model.safetensors") == load(tmp_path / "source/model.safetensors")


@pytest.mark.parametrize("model_type", REMOTE)
def test_every_rule_meets_a_tensor(model_type: str, tmp_path: Path) -> None:
    save(model_type, tmp_path / "source")
    checkpoint = open_full(tmp_path / "source")
    policy = choose_policy("auto", checkpoint.config)
    assert policy is builtin_policies()[model_type]
    old = {f"transformer.{name}.inv_freq": (3,) for name in ("rotary_emb", "rotary_pos_emb", "rotary")}
    old = {name: shape for name, shape in old.items() if model_type in ROTARY and ROTARY[model_type] in name}
    assert set(policy.levels[0]) - set(match_all(policy, checkpoint.shapes | old).values()) == set()


ROTARY = {"qwen": ".rotary_emb.", "chatglm": ".rotary_pos_emb.", "exaone": ".rotary."}
WRONG = {
    "qwen": ("attn.c_attn: {rule: column, heads: H}", "attn.c_attn"),
    "internlm2": ("attention.wqkv: {rule: column, parts: [H, K, K]}", "attention.wqkv"),
    "baichuan": ("self_attn.W_pack: {rule: column, heads: H}", "self_attn.W_pack"),
    "chatglm": ("mlp.dense_h_to_4h: column", "mlp.dense_h_to_4h"),
}


@pytest.mark.parametrize("model_type", WRONG)
def test_another_order_is_found(model_type: str, tmp_path: Path) -> None:
    rule, layer = WRONG[model_type]
    (tmp_path / "wrong.yaml").write_text(f"name: wrong\nextends: {model_type}\nrules:\n  {rule}\n")
    save(model_type, tmp_path / "source")
    report = verified(tmp_path, 2, str(tmp_path / "wrong.yaml"))
    found = {check.name: [str(finding) for finding in check.findings] for check in report.checks}
    assert report.verdict is Verdict.FAIL
    assert any(".0." in line for line in found["forward"])
    if model_type in FAMILIES:
        assert any(layer in line for line in found["layout"]), found["layout"]
