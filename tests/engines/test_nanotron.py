"""nanotron's folders, read: merged they are the Hugging Face folder again, bit for bit; what is wrong is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engines import nanotron_oracle
from tests.engines.folders import llama_folder
from tests.engines.test_deepspeed import merged, same
from tpshard.cli.main import _run

Tensors = dict[str, torch.Tensor]
HEADS, KV_HEADS = 8, 4


def written(folder: Path, ranks: int, tied: bool = False, interleaved: bool = False) -> Tensors:
    """A model's own tensors; it is written as Hugging Face's folder and as nanotron's."""
    llama_folder(folder / "hf", tie_word_embeddings=tied, num_hidden_layers=2)
    whole = load_file(folder / "hf/model.safetensors")
    config = json.loads((folder / "hf/config.json").read_text())
    theirs = dict(whole)
    for name, tensor in whole.items() if interleaved else ():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = HEADS if "q_proj" in name else KV_HEADS
            halves = tensor.view(heads, 2, -1, tensor.shape[1])
            theirs[name] = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
    nanotron_oracle.write(theirs, config, ranks, folder / "nanotron")
    record = folder / "nanotron/model_config.json"
    keys = {"is_llama_config": True, "rope_interleaved": interleaved}
    record.write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"} | keys))
    (folder / "nanotron/config.yaml").write_text("general: {}\n")
    (folder / "nanotron/checkpoint_metadata.json").write_text(json.dumps({"version": "1.5", "tp": ranks}))
    return whole


@pytest.mark.parametrize(
    ("ranks", "tied", "interleaved"), [(1, False, False), (2, False, False), (4, True, False), (2, True, True)]
)
def test_back(ranks: int, tied: bool, interleaved: bool, tmp_path: Path) -> None:
    whole = written(tmp_path, ranks, tied, interleaved)
    assert same(merged(tmp_path / "nanotron", tmp_path / "out"), whole)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    config = json.loads((tmp_path / "hf/config.json").read_text())
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: config[key] for key in made} == made


def test_to_another_engine_and_number_of_ranks(tmp_path: Path) -> None:
    whole = written(tmp_path, 2, interleaved=True)
    words = ["reshard", str(tmp_path / "nanotron"), str(tmp_path / "vllm"), "--tp", "4", "--to", "vllm", "--quiet"]
    assert _run(words) == 0
    assert same(merged(tmp_path / "vllm", tmp_path / "out"), whole)


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, 2, interleaved=True)
    words = ["verify", str(tmp_path / "nanotron"), "--against", str(tmp_path / "hf"), "--level"]
    assert _run([*words, "forward"]) == 0
    file = tmp_path / "nanotron" / UP.replace("0/pp_block/mlp/gate_up_proj", "1/pp_block/attn/qkv_proj")
    changed(file, lambda tensor: tensor[5, 7].add_(1))
    capsys.readouterr()
    assert _run([*words, "weights"]) == 1
    assert "model.layers.1.self_attn.q_proj.weight" in capsys.readouterr().out


def changed(file: Path, edit: Callable[[torch.Tensor], object], **said: str) -> None:
    tensor = load_file(file)["data"]
    edit(tensor)
    with safe_open(file, "pt") as opened:
        metadata = {**(opened.metadata() or {}), **said}
    save_file({"data": tensor}, file, metadata)


UP = "model/model/decoder/0/pp_block/mlp/gate_up_proj/model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
NORM = "model/model/decoder/0/pp_block/input_layernorm/model_weight.safetensors"


def nothing(tensor: torch.Tensor) -> None:
    return


def record_of(folder: Path, **changes: object) -> None:
    file = folder / "model_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def of_experts(folder: Path) -> None:
    file = folder / UP
    file.rename(file.with_name(file.name.replace(".safetensors", "_exp-rank-0-of-2.safetensors")))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank is missing": (lambda folder: (folder / UP).unlink(), "has files of the ranks [0] of 2"),
    "a norm is missing": (lambda folder: (folder / NORM).unlink(), "model.layers.0.input_layernorm.weight is in none"),
    "cut off": (lambda folder: (folder / UP).write_bytes((folder / UP).read_bytes()[:-9]), "truncated"),
    "another model's shape": (
        lambda folder: changed(folder / UP, nothing, unsharded_shape="(282, 48)"),
        "ranks disagree on what it is",
    ),
    "no shape": (lambda folder: changed(folder / UP, nothing, unsharded_shape="x"), "'x' is no shape"),
    "slices of steps": (
        lambda folder: changed(folder / UP, nothing, local_global_slices_pairs="0,140,2|None,None,None#0,140,2|0,48,1"),
        "are no slices",
    ),
    "slices beyond": (
        lambda folder: changed(
            folder / UP, nothing, local_global_slices_pairs="0,140,None|None,None,None#200,340,None|None,None,None"
        ),
        "goes beyond",
    ),
    "slices of a part": (
        lambda folder: changed(
            folder / UP, nothing, local_global_slices_pairs="0,70,None|None,None,None#70,140,None|None,None,None"
        ),
        "cover 3360 of 6720 cells",
    ),
    "nothing said": (
        lambda folder: save_file({"data": load_file(folder / UP)["data"]}, folder / UP),
        "does not say which part",
    ),
    "another name": (
        lambda folder: save_file(load_file(folder / NORM), folder / "model/model/x.safetensors"),
        "called",
    ),
    "another tensor": (
        lambda folder: shutil.copytree((folder / NORM).parent, folder / "model/model/decoder/0/pp_block/router"),
        "has no place in a Llama",
    ),
    "experts": (of_experts, "of a group of experts"),
    "no Llama": (lambda folder: record_of(folder, is_llama_config=False), "of another model than Llama"),
    "too few layers": (lambda folder: record_of(folder, num_hidden_layers=1), "beyond what model_config.json says"),
    "no layers": (lambda folder: record_of(folder, num_hidden_layers="3"), "not a number from 1"),
    "other heads": (lambda folder: record_of(folder, num_attention_heads=9), "are not 9+4+4 equal shares"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, 2)
    breaking, said = WRONG[case]
    breaking(tmp_path / "nanotron")
    assert _run(["merge", str(tmp_path / "nanotron"), str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
