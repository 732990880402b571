"""Megatron-LM folders: bit for bit what a slow oracle writes, and megatron-core's own logits from what we write.

The oracle (megatron_oracle.py) is proven by megatron-core itself (test_megatron_oracle.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.engines.megatron_oracle import Cut, write_folder  # noqa: E402
from tests.engines.megatron_samples import TOKENS, twins  # noqa: E402
from tests.engines.moves import whole  # noqa: E402
from tpshard.conversion import Options, run, without_manifest  # noqa: E402
from tpshard.convert import plan_merge, plan_reshard, plan_split  # noqa: E402
from tpshard.engines.opening import Source  # noqa: E402
from tpshard.errors import InputError, PolicyError, TpshardError  # noqa: E402
from tpshard.mesh import Grid, Mesh  # noqa: E402
from tpshard.verify.report import Verdict  # noqa: E402
from tpshard.verify.request import Request  # noqa: E402
from tpshard.verify.run import verify  # noqa: E402

FILE = "model_optim_rng.pt"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model's folder, tensors, config and logits, made when first asked for."""
    return twins(tmp_path_factory)


def ranks_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Every rank's tensors, flat."""
    found = {}
    for path in sorted(folder.rglob(FILE)):
        model = torch.load(path, weights_only=False)["model"]
        found[path.parent.name] = model
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def merged(source: Path | Source, target: Path) -> dict[str, Any]:
    run(plan_merge(source, target))
    return whole(target)


@pytest.mark.parametrize(
    ("name", "engine", "cut"),
    [
        ("llama", "megatron:local", Cut(1)),
        ("llama", "megatron:local", Cut(4)),
        ("llama", "megatron", Cut(2, names="mcore-te")),
        ("llama_tied", "megatron:local", Cut(2, 2)),
        ("llama_wide_head", "megatron", Cut(2, 4, names="mcore-te")),
        ("qwen2", "megatron:local", Cut(2)),
        ("qwen3", "megatron", Cut(2, names="mcore-te")),
        ("mixtral", "megatron:local", Cut(2)),
        ("mixtral", "megatron", Cut(2, names="mcore-te", experts="te")),
        ("gpt2", "megatron:local", Cut(4)),
        ("gpt2", "megatron", Cut(2, 2, names="mcore-te")),
        ("gpt_neox", "megatron:local", Cut(2)),
    ],
)
def test_written_as_the_oracle_writes(models: Any, tmp_path: Path, name: str, engine: str, cut: Cut) -> None:
    folder, hf, config, _ = models(name)
    write_folder(tmp_path / "theirs", hf, config, cut)
    run(plan_split(folder, tmp_path / "ours", Grid(Mesh(tp=cut.tp, pp=cut.pp)), engine=engine))
    theirs, ours = ranks_of(tmp_path / "theirs"), ranks_of(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for place, tensors in theirs.items():
        assert same(ours[place], tensors), place
    assert same(merged(tmp_path / "ours", tmp_path / "merged"), hf)
    (tmp_path / "ours/tpshard.json").unlink()
    assert same(merged(tmp_path / "ours", tmp_path / "again"), hf)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("llama", Cut(2, names="legacy", divisible_by=16)),
        ("llama", Cut(2, 2, names="legacy-old", divisible_by=7)),
        ("llama_tied", Cut(2, 2, names="legacy")),
        ("llama_mha", Cut(2, names="legacy", version=0)),
        ("llama_mha", Cut(4, names="legacy-old", version=1.0)),
        ("llama_mha", Cut(2, names="legacy", version=2.0)),
        ("gpt2", Cut(2, names="legacy-old", version=0)),
        ("gpt2", Cut(2, 2, names="legacy", version=1.0)),
        ("gpt2", Cut(4, names="legacy-old", version=3.0)),
        ("gpt_neox", Cut(2, names="legacy", version=0)),
        ("gpt_neox", Cut(2, names="legacy", version=1.0)),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_older_folders_are_read(models: Any, tmp_path: Path, name: str, cut: Cut, with_config: bool) -> None:
    """Without config.json what the arguments say is enough."""
    _, hf, config, _ = models(name)
    write_folder(tmp_path / "theirs", hf, config, cut)
    source = Source(tmp_path / "theirs", config=config if with_config else None)
    assert same(merged(source, tmp_path / "merged"), hf)
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert (written["model_type"], written["vocab_size"]) == (config["model_type"], config["vocab_size"])


def test_arguments_are_what_megatron_reads(models: Any, tmp_path: Path) -> None:
    """The same as the oracle's, which Megatron-LM's own loader took, but for what says nothing of the weights."""
    folder, hf, config, _ = models("llama")
    write_folder(tmp_path / "theirs", hf, config, Cut(2, 2, names="mcore-te"))
    run(plan_split(folder, tmp_path / "ours", Grid(Mesh(tp=2, pp=2)), engine="megatron"))
    theirs, ours = (
        torch.load(next((tmp_path / whose).rglob(FILE)), weights_only=False) for whose in ("theirs", "ours")
    )
    assert isinstance(ours["args"], argparse.Namespace)
    assert ours["checkpoint_version"] == theirs["checkpoint_version"] == 3.0
    assert (tmp_path / "ours/latest_checkpointed_iteration.txt").read_text() == "release"
    differ = {key for key, value in vars(ours["args"]).items() if vars(theirs["args"]).get(key, value) != value}
    assert differ <= {"iteration"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "pp"), [("llama", 2, 1), ("qwen3", 2, 1), ("gpt2", 4, 1), ("mixtral", 2, 1)])
def test_megatron_core_computes_the_reference_logits(models: Any, tmp_path: Path, name: str, tp: int, pp: int) -> None:
    """megatron-core's GPTModel, tensor parallel over gloo, loads our files strictly and agrees with transformers."""
    pytest.importorskip("megatron.core")
    from tests.engines.megatron_truth import logits_of

    folder, _, config, expected = models(name)
    run(plan_split(folder, tmp_path / "ours", Grid(Mesh(tp=tp, pp=pp)), engine="megatron:local"))
    logits = torch.tensor(logits_of(tmp_path / "ours", config, TOKENS, tp=tp))[..., : config["vocab_size"]]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_straight_to_another_engine_and_number_of_ranks(models: Any, tmp_path: Path) -> None:
    folder, hf, _, _ = models("llama")
    run(plan_split(folder, tmp_path / "megatron", 4, engine="megatron"))
    run(plan_reshard(tmp_path / "megatron", tmp_path / "vllm", 2, engine="vllm"))
    run(plan_split(folder, tmp_path / "direct", 2, engine="vllm"))
    for rank in range(2):
        name = f"model-rank-{rank}-part-0.safetensors"
        assert (tmp_path / "vllm" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    assert not (tmp_path / "vllm/latest_checkpointed_iteration.txt").exists()
    assert same(merged(tmp_path / "vllm", tmp_path / "merged"), hf)


def test_workers_make_no_difference(models: Any, tmp_path: Path) -> None:
    folder = models("llama")[0]
    for workers in (1, 5):
        options = Options(workers=workers)
        run(plan_split(folder, tmp_path / str(workers), 2, options=options, engine="megatron"), options)
    one, other = (sorted(path for path in (tmp_path / n).rglob("*") if path.is_file()) for n in "15")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_verified_through_the_profile(models: Any, tmp_path: Path) -> None:
    folder = models("llama")[0]
    run(without_manifest(plan_split(folder, tmp_path / "ranks", 2, engine="megatron")))
    report = verify(Request(tmp_path / "ranks", folder, level="forward"))
    assert report.verdict is Verdict.PASS
    path = next((tmp_path / "ranks").rglob("mp_rank_01/*"))
    record = torch.load(path, weights_only=False)
    qkv = "decoder.layers.1.self_attention.linear_qkv.weight"
    record["model"][qkv] = record["model"][qkv].flip(0)
    torch.save(record, path)
    report = verify(Request(tmp_path / "ranks", folder, level="weights"))
    assert report.verdict is Verdict.FAIL
    assert {finding.tensor for check in report.checks for finding in check.findings} == {
        f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"
    }


# ---------------------------------------------------------------------------------------------- bad input


def broken(tmp_path: Path, models: Any, change: Any) -> TpshardError:
    """What merging says of a folder of four ranks after a change to one rank's record."""
    _, hf, config, _ = models("llama")
    write_folder(tmp_path / "ranks", hf, config, Cut(4))
    path = tmp_path / "ranks/iter_0000001/mp_rank_02" / FILE
    record = torch.load(path, weights_only=False)
    change(record)
    torch.save(record, path)
    with pytest.raises(TpshardError) as caught:
        run(plan_merge(tmp_path / "ranks", tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    assert "\n" not in str(caught.value)
    return caught.value


def _version(record: dict[str, Any]) -> None:
    record["checkpoint_version"] = 2.0


def _iteration(record: dict[str, Any]) -> None:
    record["iteration"] = 77


def _extra(record: dict[str, Any]) -> None:
    record["model"]["decoder.layers.0.adapter.weight"] = torch.ones(3, 5)


def _less(record: dict[str, Any]) -> None:
    del record["model"]["decoder.layers.3.mlp.linear_fc2.weight"]


def _shape(record: dict[str, Any]) -> None:
    record["model"]["decoder.layers.3.mlp.linear_fc2.weight"] = torch.ones(3, 5)


def _other_run(record: dict[str, Any]) -> None:
    record["model"]["decoder.final_layernorm.weight"] += 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_version, "rank 0 says checkpoint_version 3.0, rank 2 2.0"),
        (_iteration, "rank 0 says iteration 1, rank 2 77"),
        (_extra, "decoder.layers.0.adapter.weight"),
        (_less, "model.layers.3.mlp.down_proj.weight: rank 2 has nothing of it, rank 0 has a part"),
        (_shape, "decoder.layers.3.mlp.linear_fc2.weight"),
        (_other_run, "hold copies that differ"),
        (lambda record: record.update(model0=record.pop("model")), "virtual pipeline"),
        (lambda record: record.pop("model"), "has no 'model'"),
    ],
)
def test_ranks_that_do_not_belong_together(tmp_path: Path, models: Any, change: Any, says: str) -> None:
    error = broken(tmp_path, models, change)
    assert says in str(error)
    assert error.exit_code == 3


@pytest.mark.parametrize("version", [0.5, 4.0, "3"])
def test_a_version_that_is_not_known(tmp_path: Path, models: Any, version: object) -> None:
    _, hf, config, _ = models("llama")
    write_folder(tmp_path / "ranks", hf, config, Cut(2))
    for path in (tmp_path / "ranks").rglob(FILE):
        torch.save(torch.load(path, weights_only=False) | {"checkpoint_version": version}, path)
    with pytest.raises(InputError, match="checkpoint_version"):
        plan_merge(tmp_path / "ranks", tmp_path / "merged")


def test_half_a_folder(tmp_path: Path, models: Any) -> None:
    _, hf, config, _ = models("llama")
    write_folder(tmp_path / "ranks", hf, config, Cut(4))
    last = tmp_path / "ranks/iter_0000001/mp_rank_03"
    shutil.rmtree(last)
    with pytest.raises(InputError, match="tensor_model_parallel_size 4, there are files of 3"):
        plan_merge(tmp_path / "ranks", tmp_path / "merged")
    shutil.rmtree(last.with_name("mp_rank_01"))
    with pytest.raises(InputError, match="rank 1 has no file"):
        plan_merge(tmp_path / "ranks", tmp_path / "merged")


def test_a_config_that_is_of_another_model(tmp_path: Path, models: Any) -> None:
    _, hf, config, _ = models("llama")
    write_folder(tmp_path / "ranks", hf, config, Cut(2))
    other = Source(tmp_path / "ranks", config=config | {"num_attention_heads": 6, "num_key_value_heads": 2})
    with pytest.raises(TpshardError):
        run(plan_merge(other, tmp_path / "merged"))


def test_what_it_cannot_hold(tmp_path: Path, models: Any) -> None:
    folder = models("llama_few_groups")[0]
    with pytest.raises(PolicyError, match="each head on one rank|whole groups of heads"):
        plan_split(folder, tmp_path / "ranks", 4, engine="megatron")
    write_folder(tmp_path / "ep", *models("mixtral")[1:3], Cut(2, ep=2))
    with pytest.raises(InputError, match="groups of experts"):
        plan_merge(tmp_path / "ep", tmp_path / "merged")
    with pytest.raises(InputError, match="only read"):
        plan_split(folder, tmp_path / "ranks", 2, engine="megatron:legacy")
    save_file(
        {**load_file(folder / "model.safetensors"), "extra.weight": torch.ones(3)}, tmp_path / "model.safetensors"
    )
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(TpshardError, match=r"extra\.weight"):
        plan_split(tmp_path, tmp_path.parent / "ranks", 2, policy="llama", engine="megatron")
