"""vLLM's sharded_state folders.

``tests/data/vllm.json.gz`` has, for 71 models, the names, dtypes and shapes of every tensor that vLLM 0.32 itself held
on each rank (vllm_truth.py made it); their values were compared once, bit for bit. Here random bytes of the same models
are cut: names and shapes must be those, values an oracle's, and the way back bit for bit.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.engines.vllm_oracle import rank_of  # noqa: E402
from tests.tiny_models import build  # noqa: E402
from tpshard.conversion import run, without_manifest  # noqa: E402
from tpshard.convert import plan_merge, plan_reshard, plan_split  # noqa: E402
from tpshard.errors import InputError  # noqa: E402
from tpshard.verify.report import Verdict  # noqa: E402
from tpshard.verify.request import Request  # noqa: E402
from tpshard.verify.run import verify  # noqa: E402

DATA = Path(__file__).parent.parent / "data/vllm.json.gz"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
BY_ORACLE = (
    "llama", "llama-tied", "llama-mqa", "llama-kv4", "llama-bias", "mistral", "qwen2", "qwen3", "qwen3-tied", "gemma",
    "granite", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3",
)  # fmt: skip


@cache
def recorded() -> dict[str, Any]:
    with gzip.open(DATA) as file:
        return json.load(file)


def folder_of(name: str, folder: Path) -> dict[str, Any]:
    """The model with random bytes, none of which make NaN."""
    torch.manual_seed(0)
    facts = recorded()[name]
    tensors = {key: torch.randn(shape).to(DTYPES[dtype]) for key, (dtype, shape) in facts["hf"].items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(facts["config"]))
    return tensors


def ranks_in(folder: Path, tp: int) -> list[dict[str, Any]]:
    found = []
    for rank in range(tp):
        own: dict[str, Any] = {}
        for part in sorted(folder.glob(f"model-rank-{rank}-part-*.safetensors")):
            own |= load_file(part)
        found.append(own)
    return found


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype and a.shape == right[name].shape and torch.equal(a, right[name])
        for name, a in left.items()
    )


def kinds(tensors: dict[str, Any]) -> dict[str, Any]:
    words = {dtype: word for word, dtype in DTYPES.items()}
    return {name: [words[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()}


def some_slow(names: list[str], every: int) -> list[Any]:
    return [name if n % every == 0 else pytest.param(name, marks=pytest.mark.slow) for n, name in enumerate(names)]


@pytest.mark.parametrize("name", some_slow(sorted(recorded()), 7))
def test_names_and_shapes_are_those_that_vllm_had_and_the_way_back_is_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = folder_of(name, tmp_path / "hf")
    truth = recorded()[name]["ranks"]
    for tp in map(int, truth):
        run(plan_split(tmp_path / "hf", tmp_path / f"{tp}", tp, engine="vllm"))
        first = truth[str(tp)][0]
        for want, got in zip(truth[str(tp)], ranks_in(tmp_path / f"{tp}", tp), strict=True):
            assert kinds(got) == (want or first)
    most = max(map(int, truth))
    run(plan_merge(tmp_path / f"{most}", tmp_path / "merged"))
    assert same(load_file(tmp_path / "merged/model.safetensors"), source)
    run(without_manifest(plan_split(tmp_path / "hf", tmp_path / "bare", most, engine="vllm")))
    run(plan_merge(tmp_path / "bare", tmp_path / "again"))
    assert same(load_file(tmp_path / "again/model.safetensors"), source)


@pytest.mark.parametrize("name", some_slow(list(BY_ORACLE), 4))
def test_values_are_those_of_the_oracle(name: str, tmp_path: Path) -> None:
    source = folder_of(name, tmp_path / "hf")
    for tp in (1, 2, 4):
        run(plan_split(tmp_path / "hf", tmp_path / f"{tp}", tp, engine="vllm"))
        for rank, got in enumerate(ranks_in(tmp_path / f"{tp}", tp)):
            assert same(got, rank_of(source, recorded()[name]["config"], tp, rank)), (tp, rank)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_another_number_of_ranks_is_as_if_cut_from_the_whole(name: str, tmp_path: Path) -> None:
    folder_of(name, tmp_path / "hf")
    run(without_manifest(plan_split(tmp_path / "hf", tmp_path / "two", 2, engine="vllm")))
    run(plan_split(tmp_path / "hf", tmp_path / "four", 4, engine="vllm"))
    run(plan_reshard(tmp_path / "two", tmp_path / "again", 4, engine="vllm"))
    for left, right in zip(ranks_in(tmp_path / "four", 4), ranks_in(tmp_path / "again", 4), strict=True):
        assert same(left, right)


def test_the_whole_verification_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """And of the same with one cell of one expert changed."""
    folder_of("mixtral", tmp_path / "hf")
    run(plan_split(tmp_path / "hf", tmp_path / "two", 2, engine="vllm"))
    report = verify(Request(tmp_path / "two", against=tmp_path / "hf", level="forward", workers=1))
    assert report.verdict is Verdict.PASS, report
    file = tmp_path / "two/model-rank-1-part-0.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.routed_experts.w13_weight"][3, 5, 7] += 1
    save_file(tensors, file, {"format": "pt"})
    report = verify(Request(tmp_path / "two", against=tmp_path / "hf", level="weights", workers=1))
    assert report.verdict is Verdict.FAIL, report


def test_the_head_is_tied_where_no_tensor_is_one_whatever_the_config_says(tmp_path: Path) -> None:
    source = folder_of("gemma", tmp_path / "hf")
    config = recorded()["gemma"]["config"]
    for number, told in enumerate(({}, {"tie_word_embeddings": False})):
        plain = {key: value for key, value in config.items() if key != "tie_word_embeddings"} | told
        (tmp_path / "hf/config.json").write_text(json.dumps(plain))
        run(without_manifest(plan_split(tmp_path / "hf", tmp_path / f"cut{number}", 2, engine="vllm")))
        assert "model.embed_tokens.weight" not in ranks_in(tmp_path / f"cut{number}", 2)[0]
        run(plan_merge(tmp_path / f"cut{number}", tmp_path / f"merged{number}"))
        assert same(load_file(tmp_path / f"merged{number}/model.safetensors"), source)


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    source = folder_of("qwen3", tmp_path / "hf")
    config = tmp_path / "hf/config.json"
    plain = config.read_text()
    config.write_text(json.dumps(json.loads(plain) | {"model_type": "mamba2"}))
    with pytest.raises(InputError, match="no names are known for model_type 'mamba2'"):
        plan_split(tmp_path / "hf", tmp_path / "out", 2, engine="vllm")
    falcon = {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}
    config.write_text(json.dumps(json.loads(plain) | falcon))
    with pytest.raises(InputError, match="this kind of model: .*new_decoder_architecture True"):
        plan_split(tmp_path / "hf", tmp_path / "out", 2, engine="vllm")
    config.write_text(plain)
    source["model.layers.0.mlp.extra.weight"] = torch.ones(3)
    save_file(source, tmp_path / "hf/model.safetensors")
    with pytest.raises(Exception, match="model.layers.0.mlp.extra.weight"):
        plan_split(tmp_path / "hf", tmp_path / "out", 2, engine="vllm")


def test_a_rank_that_is_missing_or_of_another_run(tmp_path: Path) -> None:
    folder_of("qwen3_moe", tmp_path / "hf")
    run(without_manifest(plan_split(tmp_path / "hf", tmp_path / "cut", 4, engine="vllm")))
    one, file = tmp_path / "cut/model-rank-1-part-0.safetensors", tmp_path / "kept"
    one.rename(file)
    with pytest.raises(InputError, match="rank 1 has no file"):
        plan_merge(tmp_path / "cut", tmp_path / "out")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.gate.weight"] += 1
    save_file(tensors, one)
    with pytest.raises(InputError, match=r"mlp\.gate\.weight"):
        run(plan_merge(tmp_path / "cut", tmp_path / "out"))
    name = "model.layers.0.mlp.experts.routed_experts.w2_weight"
    save_file(load_file(file) | {name: tensors[name][:, :, :-1].contiguous()}, one)
    with pytest.raises(InputError):
        run(plan_merge(tmp_path / "cut", tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.skipif("TPSHARD_VLLM_PYTHON" not in os.environ, reason="TPSHARD_VLLM_PYTHON names no Python with vLLM")
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_vllm_says_the_same_after_loading_the_folder(model_type: str, tmp_path: Path) -> None:
    """Runs vLLM itself (vllm_loads.py): tokens from the Hugging Face folder, and from ours at one and two ranks."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 212, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": model_type == "qwen3",
    }  # fmt: skip
    if model_type == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    head = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[model_type]
    build(config, head).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    said = [_said(tmp_path / "hf", 1)]
    for tp in (1, 2):
        run(plan_split(tmp_path / "hf", tmp_path / f"{tp}", tp, engine="vllm"))
        said.append(_said(tmp_path / f"{tp}", tp, "--sharded"))
    assert said[1] == said[0]
    assert said[2] == said[0]


def _said(folder: Path, tp: int, *more: str) -> Any:
    script = Path(__file__).parent / "vllm_loads.py"
    command = [os.environ["TPSHARD_VLLM_PYTHON"], str(script), str(folder), str(tp), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["tokens"]
