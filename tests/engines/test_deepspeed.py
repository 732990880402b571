"""DeepSpeed's folders, read: merged they are the Hugging Face folder again, bit for bit; what is wrong is one line.

The folders are made here. By hand, the same was done with folders that DeepSpeed 0.19.8 saved (ZeRO 1 on 2 data- and
2 tensor-parallel ranks, both as universal checkpoints, init_inference on 2 ranks, ZeRO 3): all were merged bit for
bit, or refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engines import deepspeed_folders
from tests.engines.folders import llama_folder
from tpshard.cli.main import _run

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed") / "hf"
    llama_folder(folder, torch.bfloat16, attention_bias=True, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def whole(hf: Path) -> Tensors:
    return load_file(hf / "model.safetensors")


def merged(source: Path, target: Path, *words: str) -> Tensors:
    assert _run(["merge", str(source), str(target), "--quiet", *words]) == 0
    return load_file(target / "model.safetensors")


def same(got: Tensors, want: Tensors) -> bool:
    return got.keys() == want.keys() and all(
        got[name].dtype == tensor.dtype and torch.equal(got[name], tensor) for name, tensor in want.items()
    )


@pytest.mark.parametrize(("ranks", "record"), [(1, False), (2, True), (4, True), (2, False), (4, False)])
def test_training(ranks: int, record: bool, hf: Path, whole: Tensors, tmp_path: Path) -> None:
    step = deepspeed_folders.training(whole, ranks, tmp_path / "ds", record)
    words = [] if record or ranks == 1 else ["--config", str(hf)]
    assert same(merged(tmp_path / "ds", tmp_path / "out", *words), whole)
    assert same(merged(step, tmp_path / "of the step", "--from", "deepspeed", *words), whole)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        *(["config.json"] * bool(words)),
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_inference(ranks: int, hf: Path, whole: Tensors, tmp_path: Path) -> None:
    """Three ranks have 2, 1 and 1 of four heads; two have 64 and 76 of 140 channels."""
    deepspeed_folders.inference(whole, ranks, 4, tmp_path / "ds")
    assert same(merged(tmp_path / "ds", tmp_path / "out", "--config", str(hf)), whole)


def test_what_every_rank_has_in_one_file(hf: Path, whole: Tensors, tmp_path: Path) -> None:
    deepspeed_folders.inference(whole, 2, 4, tmp_path / "ds")
    name = "model.embed_tokens.weight"
    for rank in range(2):
        for file in sorted((tmp_path / "ds").glob(f"tp_{rank:02d}_*.pt")):
            torch.save({key: value for key, value in torch.load(file).items() if key != name}, file)
    torch.save({name: whole[name]}, tmp_path / "ds" / "non-tp.pt")
    assert same(merged(tmp_path / "ds", tmp_path / "out", "--config", str(hf)), whole)
    torch.save({name: whole[name], "lm_head.weight": whole["lm_head.weight"][:, :24]}, tmp_path / "ds" / "non-tp.pt")
    for file in (tmp_path / "ds").glob("tp_*.pt"):
        torch.save({key: value for key, value in torch.load(file).items() if key != "lm_head.weight"}, file)
    assert _run(["merge", str(tmp_path / "ds"), str(tmp_path / "out 2"), "--config", str(hf)]) == 3


def test_universal(hf: Path, whole: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = deepspeed_folders.universal(whole, tmp_path / "ds")
    wide = {name: tensor.float() for name, tensor in whole.items()}
    assert same(merged(tmp_path / "ds", tmp_path / "out"), wide)
    assert same(merged(step, tmp_path / "of the step"), wide)
    words = ["split", str(tmp_path / "ds"), str(tmp_path / "shards"), "--tp", "4", "--config", str(hf), "--digest"]
    assert _run([*words, "sha256"]) == 0
    assert "optimizer states of 29 parameters (exp_avg, exp_avg_sq, step): left out" in capsys.readouterr().err
    words = ["verify", str(tmp_path / "shards"), "--against", str(tmp_path / "ds"), "--level", "layout"]
    assert _run(words) == 0
    assert same(merged(tmp_path / "shards", tmp_path / "again"), wide)
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((hf / "config.json").read_text())


def test_to_another_engine_and_number_of_ranks(hf: Path, whole: Tensors, tmp_path: Path) -> None:
    deepspeed_folders.training(whole, 2, tmp_path / "train")
    deepspeed_folders.inference(whole, 3, 4, tmp_path / "serve")
    for source in ("train", "serve"):
        words = ["reshard", str(tmp_path / source), str(tmp_path / f"{source} 4"), "--tp", "4", "--config", str(hf)]
        assert _run([*words, "--to", "vllm", "--quiet"]) == 0
        assert same(merged(tmp_path / f"{source} 4", tmp_path / f"{source} again"), whole)


def test_verify(hf: Path, whole: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = deepspeed_folders.training(whole, 2, tmp_path / "ds")
    words = ["verify", str(tmp_path / "ds"), "--config", str(hf), "--against", str(hf), "--level"]
    assert _run([*words, "forward"]) == 0
    file = step / "mp_rank_01_model_states.pt"
    changed = torch.load(file)
    changed["module"]["model.layers.1.mlp.down_proj.weight"][7, 11] += 1
    torch.save(changed, file)
    capsys.readouterr()
    assert _run([*words, "weights"]) == 1
    assert "model.layers.1.mlp.down_proj.weight" in capsys.readouterr().out


def test_verify_of_inference(hf: Path, whole: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output head that is cut along its input sums up; how it is cut is DeepSpeed's own business."""
    deepspeed_folders.inference(whole, 2, 4, tmp_path / "ds")
    words = ["verify", str(tmp_path / "ds"), "--config", str(hf), "--against", str(hf), "--level"]
    assert _run([*words, "weights"]) == 0
    assert _run([*words, "layout"]) == 4
    assert _run([*words, "forward"]) == 0


# ------------------------------------------------------------------------------------------- what is wrong


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    value = torch.load(file)
    edited = edit(value)
    torch.save(value if edited is None else edited, file)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile-was-here",)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3000])


def _norm(value: Any) -> None:
    """Of another run."""
    value["module"]["model.norm.weight"] = value["module"]["model.norm.weight"] + 1


def scaled(value: Any) -> None:
    entry = next(iter(value["universal_checkpoint_info"]["affine_map"]["params"].values()))
    for rank in entry["ranks"].values():
        rank["pieces"][0]["scale"] = 0.5


def moved(value: Any) -> None:
    entry = value["universal_checkpoint_info"]["affine_map"]["params"][r"^model\.layers\.0\.mlp\.up_proj\.weight$"]
    entry["ranks"][1]["pieces"][0]["source"][0] += 48 * 71


TRAINING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank is missing": (lambda step: (step / "mp_rank_00_model_states.pt").unlink(), "mp_rank_00_model_states.pt is"),
    "the last rank is missing": (lambda step: (step / "mp_rank_01_model_states.pt").unlink(), "mp_world_size"),
    "another step": (
        lambda step: change(step / "mp_rank_01_model_states.pt", lambda v: v.update(global_steps=2)),
        "global_steps is 2, in mp_rank_00_model_states.pt 1",
    ),
    "another run": (lambda step: change(step / "mp_rank_01_model_states.pt", _norm), "copies that differ"),
    "cut off": (lambda step: cut_off(step / "mp_rank_01_model_states.pt"), "mp_rank_01_model_states.pt"),
    "hostile": (
        lambda step: torch.save({"module": Hostile()}, step / "mp_rank_01_model_states.pt"),
        "system, which is not read; nothing was executed",
    ),
    "no module": (
        lambda step: change(step / "mp_rank_00_model_states.pt", lambda v: v.update(module=None)),
        "has no table 'module'",
    ),
    "a tensor is missing": (
        lambda step: change(
            step / "mp_rank_01_model_states.pt", lambda v: v["module"].__delitem__("model.norm.weight")
        ),
        "lacks model.norm.weight",
    ),
    "multiplied": (lambda step: change(step / "mp_rank_00_model_states.pt", scaled), "multiplied by 0.5"),
    "beyond the whole": (lambda step: change(step / "mp_rank_00_model_states.pt", moved), "ends after [140, 48]"),
    "ZeRO 3": (
        lambda step: (step / "mp_rank_00_model_states.pt").rename(step / "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "was saved by ZeRO 3",
    ),
    "a pipeline": (
        lambda step: torch.save({"weight": torch.ones(3)}, step / "layer_01-model_00-model_states.pt"),
        "a file for each layer of a pipeline",
    ),
    "latest is a path": (lambda step: (step.parent / "latest").write_text("../elsewhere"), "not the name of a folder"),
    "latest is gone": (lambda step: (step.parent / "latest").write_text("global_step9"), "names global_step9"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_that_is_wrong(
    case: str, whole: Tensors, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    breaking, said = TRAINING[case]
    breaking(deepspeed_folders.training(whole, 2, tmp_path / "ds"))
    assert _run(["merge", "ds", "out", "--from", "deepspeed", "--quiet"]) == 3
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "hostile-was-here").exists()
    assert not (tmp_path / "out").exists()


def constant(value: Any) -> None:
    value["module"]["model.layers.0.mlp.up_proj.weight"].zero_()


def copied(value: Any) -> None:
    """A row bias that each rank has its own part of, to be added up."""
    value["module"]["model.layers.0.self_attn.o_proj.bias"].mul_(2)


@pytest.mark.parametrize(
    ("ranks", "edit", "said"),
    [((1,), copied, "different numbers of what nothing cuts"), ((0, 1), constant, "one number again and again")],
)
def test_parts_that_nothing_tells(
    ranks: tuple[int, ...],
    edit: Callable[[Any], None],
    said: str,
    hf: Path,
    whole: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = deepspeed_folders.training(whole, 2, tmp_path / "ds", record=False)
    for rank in ranks:
        change(step / f"mp_rank_{rank:02d}_model_states.pt", edit)
    assert _run(["merge", str(tmp_path / "ds"), str(tmp_path / "out"), "--config", str(hf)]) == 3
    assert said in capsys.readouterr().err


def test_biases_of_zeros_go_with_their_weights(hf: Path, whole: Tensors, tmp_path: Path) -> None:
    zeroed = {name: torch.zeros_like(t) if name.endswith(".bias") else t for name, t in whole.items()}
    deepspeed_folders.training(zeroed, 2, tmp_path / "ds", record=False)
    assert same(merged(tmp_path / "ds", tmp_path / "out", "--config", str(hf)), zeroed)


def record_of(folder: Path, **changes: Any) -> None:
    file = folder / "ds_inference_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def mixed(folder: Path) -> None:
    for file in folder.glob("tp_01_*.pt"):
        torch.save({name: tensor + 1 for name, tensor in torch.load(file).items()}, file)


INFERENCE: dict[str, tuple[Callable[[Path], object], str]] = {
    "int8": (lambda folder: record_of(folder, dtype="int8"), "int8 with scales"),
    "scales": (
        lambda folder: change(folder / "tp_00_00.pt", lambda v: {name: [t, t] for name, t in v.items()}),
        "int8 with scales",
    ),
    "another kind": (lambda folder: record_of(folder, type="BLOOM"), "type is 'BLOOM'"),
    "other ranks": (lambda folder: record_of(folder, tp_size=3), "for each of 3 ranks"),
    "a file is missing": (lambda folder: (folder / "tp_01_03.pt").unlink(), "names tp_01_03.pt, which is not there"),
    "a file too many": (lambda folder: torch.save({}, folder / "tp_02_00.pt"), "does not name tp_02_00.pt"),
    "another run": (mixed, "were files of two runs mixed"),
    "cut off": (lambda folder: cut_off(folder / "tp_01_00.pt"), "tp_01_00.pt"),
    "a tensor is missing": (lambda folder: torch.save({}, folder / "tp_01_03.pt"), "rank 1 has not"),
}


@pytest.mark.parametrize("case", INFERENCE)
def test_inference_that_is_wrong(
    case: str, hf: Path, whole: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking, said = INFERENCE[case]
    deepspeed_folders.inference(whole, 2, 4, tmp_path / "ds")
    breaking(tmp_path / "ds")
    assert _run(["merge", str(tmp_path / "ds"), str(tmp_path / "out"), "--config", str(hf)]) == 3
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_config_that_disagrees(hf: Path, whole: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deepspeed_folders.inference(whole, 3, 4, tmp_path / "ds")
    words = ["merge", str(tmp_path / "ds"), str(tmp_path / "out")]
    assert _run(words) == 3
    assert "there is none (give the model's with --config)" in capsys.readouterr().err
    config = json.loads((hf / "config.json").read_text())
    other = tmp_path / "config.json"
    for changes, said in [({"num_key_value_heads": 2}, "not whole heads of 2"), ({"vocab_size": 300}, "vocab_size is")]:
        other.write_text(json.dumps(config | changes))
        assert _run([*words, "--config", str(other)]) == 3
        assert said in capsys.readouterr().err


UNIVERSAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a parameter is missing": (
        lambda step: (step / "zero/lm_head.weight").rename(step / "elsewhere"),
        "has nothing of lm_head.weight",
    ),
    "a file is missing": (lambda step: (step / "zero/lm_head.weight/fp32.pt").unlink(), "fp32.pt: is not there"),
    "no tensor": (lambda step: torch.save({}, step / "zero/lm_head.weight/fp32.pt"), "holds no tensor 'param'"),
    "cut off": (lambda step: cut_off(step / "zero/lm_head.weight/fp32.pt"), "lm_head.weight/fp32.pt"),
    "frozen": (
        lambda step: change(step / "mp_rank_00_model_states.pt", lambda v: v["module"].update(frozen=torch.ones(3))),
        "frozen was not trained",
    ),
}


@pytest.mark.parametrize("case", UNIVERSAL)
def test_a_universal_checkpoint_that_is_wrong(
    case: str, whole: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking, said = UNIVERSAL[case]
    breaking(deepspeed_folders.universal(whole, tmp_path / "ds"))
    assert _run(["merge", str(tmp_path / "ds"), str(tmp_path / "out")]) == 3
    assert said in capsys.readouterr().err


def test_readers_are_listed_and_do_not_write(
    hf: Path, whole: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["engines"]) == 0
    assert re.search(r"deepspeed-universal +DeepSpeed universal checkpoint \(read only\)", capsys.readouterr().out)
    assert _run(["engines", "deepspeed-inference"]) == 0
    assert _run(["engines", "deepspeed", "--json"]) == 0
    assert _run(["split", str(hf), str(tmp_path / "out"), "--tp", "2", "--engine", "deepspeed"]) == 2
    assert "are read, not written" in capsys.readouterr().err
    deepspeed_folders.training(whole, 2, tmp_path / "ds")
    assert _run(["split", str(tmp_path / "ds"), str(tmp_path / "out"), "--tp", "2"]) == 2
    assert "tpshard reshard cuts it" in capsys.readouterr().err
    assert _run(["merge", str(tmp_path / "ds"), str(tmp_path / "out"), "--from", "deepsped"]) == 2
