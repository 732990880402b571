"""``tpshard policy``: list, show, and check against a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.build import POLICY
from tpshard.checkpoint import open_full
from tpshard.cli.main import _run
from tpshard.convert import plan_split
from tpshard.errors import PolicyError
from tpshard.library import builtin_policies, choose_policy
from tpshard.policy_check import check_policy

Capture = pytest.CaptureFixture[str]


def write(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


# ---------------------------------------------------------------------------------------------- list and show


def test_list_names_every_policy_and_model_type(capsys: Capture) -> None:
    assert _run(["policy", "list"]) == 0
    shown = capsys.readouterr().out
    for policy in builtin_policies().values():
        assert f"\n{policy.name} " in shown
        assert policy.description in shown
        for model_type in policy.applies_to["model_type"]:
            assert str(model_type) in shown
    assert max(map(len, shown.splitlines())) <= 160


def test_list_as_json(capsys: Capture) -> None:
    assert _run(["policy", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    phi3 = next(policy for policy in found["policies"] if policy["name"] == "phi3")
    assert phi3 == {
        "name": "phi3",
        "description": "Phi 3, 3.5 and 4 (dense)",
        "for": {"model_type": ["phi3"]},
        "extends": "llama",
        "file": "phi3.yaml",
    }


def test_show_prints_the_file(capsys: Capture) -> None:
    assert _run(["policy", "show", "gpt2"]) == 0
    folder = Path(__file__).parent.parent / "tpshard/policies"
    assert capsys.readouterr().out == (folder / "gpt2.yaml").read_text("utf-8")


def test_show_as_json_has_all_levels(capsys: Capture) -> None:
    assert _run(["policy", "show", "phi3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [document["name"] for document in found["documents"]] == ["phi3", "llama"]
    assert found["text"].startswith("# Phi 3")


def test_show_of_an_unknown_policy(capsys: Capture) -> None:
    assert _run(["policy", "show", "lama"]) == 2
    assert capsys.readouterr().err == ("tpshard: error: no built-in policy is called 'lama' (did you mean 'llama'?)\n")


# ---------------------------------------------------------------------------------------------- check

FITS = """\
rule            pattern                                          tensors  axis  units
row             embed_tokens                                           1     0  1003
column          self_attn.q_proj                                       6     0  6 x 10
column          self_attn.{k_proj,v_proj}                             12     0  3 x 10
row             self_attn.o_proj                                       3     1  6 x 10
row             self_attn.o_proj                                       3     -  whole
column          mlp.{gate_proj,up_proj}                               12     0  52
row             mlp.down_proj                                          3     1  52
row             mlp.down_proj                                          3     -  whole
replicate       {input_layernorm,post_attention_layernorm,norm}        7     -  whole
column, gather  lm_head                                                1     0  1003, padded by 8

policy tiny has a rule for each of 51 tensors
--tp that works, up to 128: 1, 3, 6
  not 4-5, 7-8, 10-11, 13-14, 16-17, 19-20, ...: self_attn.q_proj: 6 heads; self_attn.{k_proj,v_proj}: 3 heads; self_attn.o_proj: 6 heads
  not 9, 15, 21, 27, 33, 39, ...: self_attn.q_proj: 6 heads; self_attn.o_proj: 6 heads
  not 12, 18, 24, 30, 36, 42, ...: self_attn.o_proj: 6 heads, and a row rule may not replicate
  not 2: self_attn.{k_proj,v_proj}: 3 heads
--tp 3    works
--tp 6    works
"""


def test_a_policy_that_fits(source: Path, policy: str, capsys: Capture) -> None:
    assert _run(["policy", "check", policy, str(source), "--tp", "3,6"]) == 0
    assert capsys.readouterr() == (FITS, "")


def test_rank_counts_that_do_not_work(source: Path, policy: str, capsys: Capture) -> None:
    assert _run(["policy", "check", policy, str(source), "--tp", "2,3,4"]) == 2
    shown, error = capsys.readouterr()
    two, three, four = shown.splitlines()[-3:]
    assert three == "--tp 3    works"
    assert two.startswith("--tp 2    model.layers.0.self_attn.k_proj.")
    assert two.endswith("self_attn.{k_proj,v_proj}: 3 units cannot be dealt to 2 ranks")
    assert "units cannot be dealt to 4 ranks" in four
    assert error.startswith("tpshard: error: policy tiny does not fit at --tp 2: model.layers.0.self_attn.k_proj.")
    assert error.endswith("3 units cannot be dealt to 2 ranks (--tp that works: 1, 3, 6)\n")


def test_as_json(source: Path, policy: str, capsys: Capture) -> None:
    assert _run(["policy", "check", policy, str(source), "--tp", "3,4", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["legal_tp"] == [1, 3, 6]
    assert [(trial["tp"], trial["works"]) for trial in found["trials"]] == [(3, True), (4, False)]
    assert "cannot be dealt to 4 ranks" in found["trials"][1]["problem"]
    rows: dict[str, Any] = {rule["pattern"]: rule for rule in found["rules"]}
    assert rows["self_attn.{k_proj,v_proj}"]["units"] == [{"count": 3, "width": 10}]
    assert rows["lm_head"] == {
        "pattern": "lm_head", "rule": "column", "gather": "output", "place": f"{policy}:14:3", "tensors": 1,
        "axis": 0, "units": [{"count": 1003, "width": 1}], "uneven": False, "pad": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("  mlp.down_proj: row\n", ""), "policy tiny has no rule for 6 tensors: model.layers.0.mlp.down_proj."),
        (("  mlp.down_proj: row\n", "  mlp.down_proj: row\n  down_proj: row\n"), "2 rules match"),
        (("heads: K", "heads: absent"), "heads: 'absent' is not in the config"),
        (("heads: K", "heads: 7"), "7 heads do not divide an axis of 30"),
        (("mlp.{gate_proj,up_proj}: column", "mlp.{gate_proj,up_proj}: colum"), "did you mean 'column'?"),
    ],
)
def test_a_policy_that_does_not_fit(
    change: tuple[str, str], message: str, source: Path, tmp_path: Path, capsys: Capture
) -> None:
    wrong = write(tmp_path, POLICY.replace(*change))
    assert _run(["policy", "check", wrong, str(source)]) == 2
    shown, error = capsys.readouterr()
    assert shown == ""
    assert error.count("\n") == 1
    assert message in error


def test_unused_rules_are_warnings_and_errors_with_strict(source: Path, tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path, POLICY + "  mpl.gate_proj: column\n")
    assert _run(["policy", "check", path, str(source)]) == 0
    assert capsys.readouterr().err == f"tpshard: warning: {path}:15:3: rule 'mpl.gate_proj' matches no tensor\n"
    assert _run(["policy", "check", path, str(source), "--strict"]) == 2


def test_tensors_that_the_default_replicates_are_counted(source: Path, tmp_path: Path, capsys: Capture) -> None:
    text = POLICY.replace("  mlp.down_proj: row\n", "").replace("vars:", "default: replicate\nvars:")
    assert _run(["policy", "check", write(tmp_path, text), str(source)]) == 0
    assert (
        "replicate       (default)                                              6     -  whole\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("text", ["2,x", "2,,4", "02", "0", "2;4", "-1"])
def test_rank_counts_that_are_none(text: str, source: Path, policy: str, capsys: Capture) -> None:
    assert _run(["policy", "check", policy, str(source), "--tp", text]) == 2
    assert "is not a whole number from 1" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(policy: str, tmp_path: Path, capsys: Capture) -> None:
    assert _run(["policy", "check", policy, str(tmp_path / "absent")]) == 3
    assert "absent" in capsys.readouterr().err


def test_what_check_calls_legal_is_what_split_can_do(source: Path, policy: str, tmp_path: Path) -> None:
    checkpoint = open_full(source)
    legal = check_policy(choose_policy(policy, checkpoint.config), checkpoint).legal
    for tp in range(1, 14):
        if tp in legal:
            plan_split(source, tmp_path / "shards", tp, policy)
        else:
            with pytest.raises(PolicyError, match="cannot be dealt"):
                plan_split(source, tmp_path / "shards", tp, policy)
