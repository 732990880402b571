"""Megatron-Core's torch_dist stores as a source, against the Hugging Face models that they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from tests.engines.megatron_oracle import Cut, arguments, rank_models  # noqa: E402
from tests.engines.megatron_samples import twins  # noqa: E402
from tests.engines.torch_dist_stores import Chunk, Chunks, chunks_of, write_store  # noqa: E402
from tpshard.conversion import run  # noqa: E402
from tpshard.convert import plan_merge, plan_reshard, plan_split  # noqa: E402
from tpshard.dcp import is_dcp  # noqa: E402
from tpshard.engines.finding import recognised  # noqa: E402
from tpshard.engines.opening import Source  # noqa: E402
from tpshard.errors import InputError, TpshardError  # noqa: E402
from tpshard.verify.report import Verdict  # noqa: E402
from tpshard.verify.request import Request  # noqa: E402
from tpshard.verify.run import verify  # noqa: E402

FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model's folder, tensors and config, made when first asked for."""
    model = twins(tmp_path_factory)
    return lambda name: model(name)[:3]


def chunks(models: Any, name: str, tp: int, stacked: bool = True, folded: bool = True) -> Chunks:
    _, hf, config = models(name)
    cut = Cut(tp, names="mcore-te" if folded else "mcore-local", divisible_by=16)
    found = rank_models(hf, config, cut)
    ranks = [found[t, 0, 0]["model"] for t in range(tp)]
    return chunks_of(ranks, gated=not name.startswith("gpt"), stacked=stacked)


def args(models: Any, name: str, tp: int) -> Any:
    return arguments(models(name)[2], Cut(tp, 2, names="mcore-te", divisible_by=16))  # whoever wrote it had 2 stages


def same(target: Path, hf: dict[str, Any]) -> bool:
    got = {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return got.keys() == hf.keys() and all(
        got[name].dtype == hf[name].dtype and torch.equal(got[name], hf[name]) for name in hf
    )


@pytest.mark.parametrize(
    ("name", "tp", "stacked"),
    [
        ("llama", 1, True),
        ("llama", 2, True),
        ("llama", 4, False),
        ("llama_tied", 2, True),
        ("llama_wide_head", 4, True),
        ("qwen2", 2, True),
        ("qwen3", 2, False),
        ("mixtral", 2, True),
        ("mixtral", 4, False),
        ("gpt2", 4, True),
        ("gpt_neox", 2, True),
    ],
)
def test_merged_bit_for_bit(models: Any, tmp_path: Path, name: str, tp: int, stacked: bool) -> None:
    _folder, hf, config = models(name)
    write_store(tmp_path / "run", chunks(models, name, tp, stacked), args(models, name, tp))
    run(plan_merge(tmp_path / "run", tmp_path / "by-arguments"))
    assert same(tmp_path / "by-arguments", hf)
    assert {path.name for path in (tmp_path / "by-arguments").iterdir()} == {"config.json", "model.safetensors"}
    (tmp_path / "run/iter_0000001/common.pt").unlink()
    run(plan_merge(Source(tmp_path / "run/iter_0000001", config=config), tmp_path / "by-config"))
    assert same(tmp_path / "by-config", hf)
    assert json.loads((tmp_path / "by-config/config.json").read_text()) == config


def test_names_of_the_local_layers_and_of_parts_apart(models: Any, tmp_path: Path) -> None:
    """Experts' norms under the names of dense layers; gate and other rows each in a tensor of its own."""
    _, hf, _ = models("mixtral")
    found: Chunks = {}
    for name, parts in chunks(models, "mixtral", 2, stacked=False).items():
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        if "linear_fc1.weight" in name:
            found[f"{name}_w"] = [chunk for chunk in parts if chunk.at[0] < 88]
            found[f"{name}_v"] = [Chunk((at[0] - 88, 0), data) for at, data in parts if at[0] >= 88]
        else:
            found[name] = parts
    write_store(tmp_path / "run", found, args(models, "mixtral", 2))
    run(plan_merge(tmp_path / "run", tmp_path / "merged"))
    assert same(tmp_path / "merged", hf)


def test_what_is_not_of_the_model_is_left_out(models: Any, tmp_path: Path) -> None:
    _, hf, _ = models("llama")
    own = chunks(models, "llama", 2)
    found = {f"module.{name}": parts for name, parts in own.items()}
    found |= {f"optimizer.state.exp_avg.module.{name}": parts for name, parts in own.items()}
    write_store(tmp_path / "run", found, args(models, "llama", 2), {"rng_state/shard_0_1": b"rng"})
    plan = plan_merge(tmp_path / "run", tmp_path / "merged")
    assert [w for w in plan.plan.source.warnings if "rng_state" in w and f"{len(own)} more" in w]
    run(plan)
    assert same(tmp_path / "merged", hf)


def test_chunks_of_several_layers(models: Any, tmp_path: Path) -> None:
    _, hf, _ = models("llama")
    found = chunks(models, "llama", 2)
    name = "decoder.layers.self_attention.linear_proj.weight"
    by_place = dict(found[name])
    found[name] = [
        Chunk((first, 0, column), torch.cat([by_place[first, 0, column], by_place[first + 1, 0, column]]))
        for first in (0, 2)
        for column in (0, 48)
    ]
    write_store(tmp_path / "run", found, args(models, "llama", 2))
    run(plan_merge(tmp_path / "run", tmp_path / "merged"))
    assert same(tmp_path / "merged", hf)


def test_to_other_engines_and_ranks(models: Any, tmp_path: Path) -> None:
    folder, hf, _ = models("llama")
    write_store(tmp_path / "run", chunks(models, "llama", 2), args(models, "llama", 2))
    run(plan_reshard(Source(tmp_path / "run"), tmp_path / "own", 4))
    run(plan_merge(tmp_path / "own", tmp_path / "own-merged"))
    assert same(tmp_path / "own-merged", hf)
    for number, (engine, tp) in enumerate([("megatron", 4), ("vllm", 2)]):
        run(plan_reshard(Source(tmp_path / "run"), tmp_path / f"ranks{number}", tp, engine=engine))
        run(plan_split(folder, tmp_path / f"split{number}", tp, engine=engine))
        ours = sorted(p for p in (tmp_path / f"ranks{number}").rglob("*") if p.suffix in (".pt", ".safetensors"))
        assert ours
        for path in ours:
            other = tmp_path / f"split{number}" / path.relative_to(tmp_path / f"ranks{number}")
            load = load_file if path.suffix == ".safetensors" else lambda p: torch.load(p, weights_only=False)["model"]
            one, two = load(path), load(other)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[k], two[k]) for k in one)


def test_verified(models: Any, tmp_path: Path) -> None:
    folder, _, _ = models("llama")
    own = chunks(models, "llama", 2)
    write_store(tmp_path / "run", own, args(models, "llama", 2))
    assert verify(Request(tmp_path / "run", folder, level="forward")).verdict is Verdict.PASS
    gate = own[FC1][0]
    own[FC1][0] = Chunk(gate.at, gate.data.flip(1))
    shutil.rmtree(tmp_path / "run")
    write_store(tmp_path / "run", own, args(models, "llama", 2))
    report = verify(Request(tmp_path / "run", folder, level="weights"))
    assert report.verdict is Verdict.FAIL
    assert {finding.tensor for check in report.checks for finding in check.findings} == {
        "model.layers.0.mlp.gate_proj.weight"
    }


def test_recognised_before_any_distributed_checkpoint(models: Any, tmp_path: Path) -> None:
    write_store(tmp_path / "run", chunks(models, "llama", 2), None)
    store = tmp_path / "run/iter_0000001"
    assert is_dcp(store)
    for folder in (tmp_path / "run", store):
        found = recognised(folder)
        assert found is not None
        assert found.name == "megatron"
    (store / "metadata.json").unlink()
    found = recognised(store)
    assert found is not None
    assert found.name == "dcp"
    with pytest.raises(TpshardError, match="only read"):
        plan_split(models("llama")[0], tmp_path / "ranks", 2, engine="megatron:dist")


# ---------------------------------------------------------------------------------------------- bad input


def _whole(name: str) -> Any:
    """One tensor whole in the store, as of ranks that each had all of it."""

    def change(found: Chunks) -> None:
        axis = 2 if "fc2" in name else 1
        layers = sorted({at[0] for at, _ in found[name]})
        found[name] = [
            Chunk(
                (n, 0, 0), torch.cat([data for at, data in sorted(found[name], key=lambda c: c.at) if at[0] == n], axis)
            )
            for n in layers
        ]

    return change


def _halves(found: Chunks) -> None:
    name = "decoder.layers.self_attention.q_layernorm.weight"
    found[name] = [Chunk((n, half * 6), torch.ones(1, 6) + half) for n in range(4) for half in range(2)]


def _quarters(found: Chunks) -> None:
    name = "decoder.layers.self_attention.linear_qkv.weight"
    found[name] = [
        Chunk((at[0], at[1] + half * 48, 0), data[:, half * 48 : half * 48 + 48])
        for at, data in found[name]
        for half in range(2)
    ]


def _blocks(found: Chunks) -> None:
    name = "decoder.layers.self_attention.linear_qkv.weight"
    found[name] = [
        Chunk((*at[:2], half * 24), data[..., half * 24 : half * 24 + 24])
        for at, data in found[name]
        for half in range(2)
    ]


def _extra(found: Chunks) -> None:
    found["decoder.layers.adapter.weight"] = [Chunk((0, 0), torch.ones(4, 7))]


def _hole(found: Chunks) -> None:
    del found[FC1][3]


def _no_embedding(found: Chunks) -> None:
    del found["embedding.word_embeddings.weight"]


def _stray(found: Chunks) -> None:
    found["decoder.layers.mlp.scale"] = [Chunk((), torch.ones(()))]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_whole("decoder.layers.mlp.linear_fc2.weight"), "cut by the policy, and whole in the store"),
        (_whole(FC1), "no such tensor"),
        (_halves, "whole by the policy, and cut in the store"),
        (_quarters, r"linear_qkv\.weight: is in 4 parts, the embedding in 2"),
        (_blocks, "cut along 2 axes"),
        (_extra, "no such tensor"),
        (_hole, "linear_fc1"),
        (_no_embedding, "no embedding"),
        (_stray, "no cells for each layer"),
    ],
)
def test_bad_stores(models: Any, tmp_path: Path, change: Any, says: str) -> None:
    found = chunks(models, "llama", 2)
    change(found)
    write_store(tmp_path / "run", found, args(models, "llama", 2))
    with pytest.raises(TpshardError, match=says) as caught:
        plan_merge(tmp_path / "run", tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_bad_folders(models: Any, tmp_path: Path) -> None:
    config = models("llama")[2]
    run_folder = tmp_path / "run"
    write_store(run_folder, chunks(models, "llama", 2), args(models, "llama", 2))

    def says(text: str, source: Source) -> None:
        with pytest.raises(TpshardError, match=text) as caught:
            plan_merge(source, tmp_path / "merged")
        assert "\n" not in str(caught.value)

    says("hidden_size is 64 in config.json, 48", Source(run_folder, config=config | {"hidden_size": 64}))
    says("no names are known for model_type 'bert'", Source(run_folder, config={"model_type": "bert"}))
    shutil.copytree(run_folder / "iter_0000001", run_folder / "iter_0000002")
    plan_merge(run_folder, tmp_path / "merged")  # the tracker says 1
    (run_folder / "latest_checkpointed_iteration.txt").unlink()
    says("several stores", Source(run_folder))
    shutil.rmtree(run_folder / "iter_0000002")
    next((run_folder / "iter_0000001").glob("*.distcp")).unlink()
    says("is not there", Source(run_folder))
    (run_folder / "release/mp_rank_00").mkdir(parents=True)
    (run_folder / "release/mp_rank_00/model_optim_rng.pt").write_bytes(b"")
    says("and files of ranks", Source(run_folder))


def test_no_config(models: Any, tmp_path: Path) -> None:
    write_store(tmp_path / "run", chunks(models, "llama", 2), None)
    with pytest.raises(InputError, match="no config.json"):
        plan_merge(tmp_path / "run", tmp_path / "merged")
