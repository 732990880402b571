"""TensorRT-LLM's checkpoints: every rank's file as the oracle has it, its config.json, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.engines import meta_oracle, trtllm_oracle
from tests.engines.folders import llama_folder, mixtral_folder
from tests.engines.moves import assert_ranks, assert_same, do, refused, verdict, whole
from tests.engines.trtllm_oracle import Ranks

Capture = pytest.CaptureFixture[str]
PLAIN = {"rope_theta": 30000.0, "rope_type": "default"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": PLAIN},
    "biased": {"attention_bias": True, "rope_parameters": {**meta_oracle.SCALED, "rope_theta": 50000.0}},
    "tied": {"tie_word_embeddings": True},
    "odd": {"vocab_size": 211, "num_key_value_heads": 2, "intermediate_size": 136},
    "mixtral": {"rope_parameters": PLAIN},
}
CASES = [
    ("llama", Ranks(1)), ("llama", Ranks(2, 2)), ("biased", Ranks(4)), ("tied", Ranks(2, 3)), ("odd", Ranks(4, 2)),
    ("odd", Ranks(8)), ("mixtral", Ranks(2)), ("mixtral", Ranks(4, 2)),
]  # fmt: skip
NAMES = [f"{model}-{ranks.tp}x{ranks.pp}" for model, ranks in CASES]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, changes in MODELS.items():
        make = mixtral_folder if name == "mixtral" else llama_folder
        make(folder / name, torch.bfloat16, **changes)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def written(source: Path, target: Path, ranks: Ranks) -> Path:
    """As TensorRT-LLM has it: without the model's own config.json."""
    trtllm_oracle.write(whole(source), config_of(source), "bfloat16", ranks, target)
    return target


def grid(ranks: Ranks) -> tuple[str, ...]:
    return ("--tp", str(ranks.tp), *(("--pp", str(ranks.pp)) if ranks.pp > 1 else ()))


@pytest.mark.parametrize(("model", "ranks"), CASES, ids=NAMES)
def test_there_and_back(model: str, ranks: Ranks, models: Path, tmp_path: Path) -> None:
    source, ours = models / model, tmp_path / "ours"
    do("split", source, ours, *grid(ranks), "--engine", "trtllm")
    want = trtllm_oracle.rank_tensors(whole(source), config_of(source), ranks)
    assert_ranks(ours, "rank{}.safetensors", load_file, want)
    theirs = written(source, tmp_path / "theirs", ranks)
    for file in theirs.glob("*.safetensors"):
        assert file.read_bytes() == (ours / file.name).read_bytes(), file.name
    made, expected = (config_of(folder) for folder in (ours, theirs))
    made["moe"].pop("normalization_mode", None)
    if expected["rotary_scaling"]:
        expected["rotary_scaling"].pop("rope_theta")  # it is rotary_base
    assert made == expected
    do("merge", ours, tmp_path / "back")
    (ours / "tpshard.json").unlink()
    do("merge", ours, tmp_path / "again")
    for folder in (tmp_path / "back", tmp_path / "again"):
        assert_same(whole(folder), whole(source))
        assert config_of(folder) == config_of(source)
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in source.iterdir())


@pytest.mark.parametrize(("model", "ranks"), CASES, ids=NAMES)
def test_their_own_folder(model: str, ranks: Ranks, models: Path, tmp_path: Path) -> None:
    """With nothing but their config.json, of which the model's is made."""
    source = models / model
    do("merge", written(source, tmp_path / "theirs", ranks), tmp_path / "back")
    assert_same(whole(tmp_path / "back"), whole(source))
    ours, before = (transformers.AutoConfig.from_pretrained(folder) for folder in (tmp_path / "back", source))
    for key in (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "dtype", "hidden_act",
        "rope_parameters", "architectures",
    ):  # fmt: skip
        assert getattr(ours, key) == getattr(before, key), key
    own = ("num_local_experts", "num_experts_per_tok") if model == "mixtral" else ("attention_bias", "head_dim")
    assert [getattr(ours, key) for key in own] == [getattr(before, key) for key in own]


def test_a_router_that_is_f32_in_full_stays_so(models: Path, tmp_path: Path) -> None:
    source, name = models / "mixtral", "transformer.layers.1.mlp.router.weight"
    theirs = written(source, tmp_path / "theirs", Ranks(2))
    router = load_file(theirs / "rank0.safetensors")[name] * 1.001
    for rank in range(2):
        path = theirs / f"rank{rank}.safetensors"
        save_file({**load_file(path), name: router}, path)
    do("merge", theirs, tmp_path / "back")
    assert_same(whole(tmp_path / "back"), {**whole(source), "model.layers.1.block_sparse_moe.gate.weight": router})


def test_other_numbers_of_ranks_and_engines(models: Path, tmp_path: Path) -> None:
    source = models / "mixtral"
    theirs = written(source, tmp_path / "theirs", Ranks(4, 2))
    do("reshard", theirs, tmp_path / "two", "--tp", "2", "--to", "trtllm")
    want = trtllm_oracle.rank_tensors(whole(source), config_of(source), Ranks(2))
    assert_ranks(tmp_path / "two", "rank{}.safetensors", load_file, want)
    source = models / "tied"
    do("split", source, tmp_path / "meta", "--tp", "4", "--engine", "meta")
    do("reshard", tmp_path / "meta", tmp_path / "trtllm", "--tp", "2", "--pp", "3", "--to", "trtllm")
    want = trtllm_oracle.rank_tensors(whole(source), config_of(source), Ranks(2, 3))
    assert_ranks(tmp_path / "trtllm", "rank{}.safetensors", load_file, want)
    do("merge", tmp_path / "trtllm", tmp_path / "back")
    assert_same(whole(tmp_path / "back"), whole(source))


def test_verified_and_a_fault_found(models: Path, tmp_path: Path, capsys: Capture) -> None:
    source = models / "biased"
    do("split", source, tmp_path / "trt", "--tp", "2", "--pp", "2", "--engine", "trtllm")
    told = ("--against", source, "--level", "forward")
    code, said = verdict(capsys, tmp_path / "trt", *told)
    assert code == 0, said
    theirs = written(source, tmp_path / "theirs", Ranks(2, 2))
    path, name = theirs / "rank3.safetensors", "transformer.layers.0.attention.qkv.weight"  # of the last layer
    tensors = load_file(path)
    q, k, v = tensors[name].split([24, 12, 12])
    save_file({**tensors, name: torch.cat([q, v, k])}, path)
    code, said = verdict(capsys, theirs, *told)
    assert code == 1
    assert "model.layers.2.self_attn.k_proj.weight" in said


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 40}, "'hidden_size' is 40, by transformer.vocab_embedding.weight it is 48"),
        ({"vocab_size": 213}, "'vocab_size' is 213, by transformer.vocab_embedding.weight it is 212"),
        ({"num_hidden_layers": 4}, "'num_hidden_layers' is 4, by the layers' names it is 3"),
        ({"num_attention_heads": 4}, "'num_attention_heads' is 4, by attention.dense it is 8"),
        ({"num_key_value_heads": 3}, "'num_key_value_heads' is 3, by attention.qkv it is 4"),
        ({"architecture": "GPTForCausalLM"}, "architecture GPTForCausalLM is not known"),
        ({"use_parallel_embedding": True}, "a cut embedding is not read"),
        ({"quantization": {"quant_algo": "FP8"}}, "quantised files of TensorRT-LLM are not read"),
        ({"mapping": {"tp_size": 2, "moe_ep_size": 2}}, "'moe_ep_size' is 2, only 1 is read"),
        ({"mapping": {"tp_size": 4}}, "rank 2 has no file, and there are 4 ranks"),
        ({"mapping": {"tp_size": 1}}, "has a file of rank 1, and there are 1 ranks"),
        ({"mapping": {"tp_size": 2, "world_size": 4}}, "'world_size' is 4, by tp_size and pp_size it is 2"),
        ({"mapping": 3}, "is not TensorRT-LLM's"),
        ({"rotary_scaling": "yes"}, "'rotary_scaling' is 'yes', not a table"),
    ],
)
def test_a_config_that_is_another_models(
    change: dict[str, Any], said: str, models: Path, tmp_path: Path, capsys: Capture
) -> None:
    theirs = written(models / "llama", tmp_path / "theirs", Ranks(2))
    (theirs / "config.json").write_text(json.dumps({**config_of(theirs), **change}))
    assert said in refused(capsys, 3, "merge", theirs, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_ranks_that_are_missing_or_of_another_run(models: Path, tmp_path: Path, capsys: Capture) -> None:
    theirs = written(models / "llama", tmp_path / "theirs", Ranks(2, 2))
    words = ("merge", theirs, tmp_path / "back")
    last = theirs / "rank3.safetensors"
    kept = last.read_bytes()
    last.unlink()
    assert "rank 1 of stage 1 has no file" in refused(capsys, 3, *words)
    last.write_bytes(kept)
    tensors = load_file(last)
    save_file({**tensors, "transformer.ln_f.weight": -tensors["transformer.ln_f.weight"]}, last)
    assert "model.norm.weight: ranks 2 and 3 hold copies that differ" in refused(capsys, 3, *words)
    save_file({**tensors, "transformer.layers.0.mlp.fc.bias": torch.ones(3)}, last)
    assert "has no such tensor in a llama model" in refused(capsys, 3, *words)
    last.write_bytes((theirs / "rank1.safetensors").read_bytes())
    refused(capsys, 3, *words)
    (theirs / "config.json").unlink()
    assert "config.json: is not there" in refused(capsys, 3, *words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlp_bias": True}, "mlp.down_proj.bias: TensorRT-LLM checkpoint has no place for it"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    ],
)
def test_what_it_has_no_place_for(change: dict[str, Any], said: str, tmp_path: Path, capsys: Capture) -> None:
    llama_folder(tmp_path / "hf", torch.bfloat16, **change)
    assert said in refused(capsys, 3, "split", tmp_path / "hf", tmp_path / "trt", "--tp", "2", "--engine", "trtllm")


def test_a_router_that_cannot_be_widened(tmp_path: Path, capsys: Capture) -> None:
    mixtral_folder(tmp_path / "hf", torch.float16)
    said = refused(capsys, 3, "split", tmp_path / "hf", tmp_path / "trt", "--tp", "2", "--engine", "trtllm")
    assert "is F16, and only one BF16 tensor can be widened to F32" in said
    mixtral_folder(tmp_path / "f32", torch.float32)
    do("split", tmp_path / "f32", tmp_path / "trt", "--tp", "2", "--engine", "trtllm", "--no-manifest")
    do("merge", tmp_path / "trt", tmp_path / "back")
    assert_same(whole(tmp_path / "back"), whole(tmp_path / "f32"))


def test_stages_that_its_loader_would_not_take(models: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("split", models / "llama", tmp_path / "trt", "--tp", "1", "--pp", "2", "--engine", "trtllm", "--stages")
    assert "deals layers as 2+1, not 1+2" in refused(capsys, 2, *words, "1,2")
    do(*words, "2,1")
    assert "[48, 140] would be [48, 18] and [48, 17]" in refused(
        capsys, 2, *words[:2], tmp_path / "8", "--tp", "8", *words[-3:-1]
    )
    assert "groups of experts are not written" in refused(
        capsys, 2, "split", models / "mixtral", tmp_path / "ep", "--tp", "2", "--ep", "2", "--engine", "trtllm"
    )
