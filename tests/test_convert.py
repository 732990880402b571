"""Split, merge and reshard through files: what is written, that it comes back, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import safetensors.numpy
import xxhash
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.build import (
    BITS,
    NUMPY,
    POLICY,
    Tensor,
    config,
    expected_shards,
    load,
    metadata_of,
    policy_file,
    save,
    tensor,
    tiny_checkpoint,
    tree,
)
from tpshard.conversion import Options, run
from tpshard.convert import plan_merge, plan_reshard, plan_split
from tpshard.demo import make_checkpoint
from tpshard.engines.opening import NATIVE
from tpshard.errors import InputError, PolicyError, StorageError, TpshardError, UsageError
from tpshard.execute import execute
from tpshard.journal import Head
from tpshard.layout import Shard, Span
from tpshard.share import Share, Written
from tpshard.staging import Staging

KV_AND_RANKS = [(3, 1), (3, 3), (3, 6), (2, 2), (2, 6), (1, 2), (1, 3), (1, 6)]


def split(source: Path, target: Path, tp: int, policy: str, **options: Any) -> Path:
    run(plan_split(source, target, tp, policy, Options(**options)), Options(**options))
    return target


def merge(source: Path, target: Path, **options: Any) -> Path:
    run(plan_merge(source, target, Options(**options)), Options(**options))
    return target


def reshard(source: Path, target: Path, tp: int, policy: str | None = None, **options: Any) -> Path:
    run(plan_reshard(source, target, tp, policy, Options(**options)), Options(**options))
    return target


def shard_file(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def refused(action: Callable[[], object], kind: type[TpshardError], target: Path) -> str:
    """The message of an action that fails and leaves neither target nor staging folder."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(kind) as caught:
        action()
    assert sorted(target.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize(("kv_heads", "ranks"), KV_AND_RANKS)
def test_shards_hold_what_numpy_slices(tmp_path: Path, kv_heads: int, ranks: int) -> None:
    """Read by safetensors' own reader."""
    tensors = tiny_checkpoint(tmp_path / "m", kv_heads)
    split(tmp_path / "m", tmp_path / "s", ranks, policy_file(tmp_path))
    for rank, expected in enumerate(expected_shards(tensors, kv_heads, ranks)):
        found = safetensors.numpy.load_file(shard_file(tmp_path / "s", rank, ranks))
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            assert np.array_equal(found[name], array), name


def test_what_a_shard_folder_holds(source: Path, policy: str, tmp_path: Path) -> None:
    split(source, tmp_path / "s", 3, policy)
    assert set(tree(tmp_path / "s")) == {
        "rank-00000-of-00003.safetensors", "rank-00001-of-00003.safetensors", "rank-00002-of-00003.safetensors",
        "config.json", "tokenizer.json", "1_Pooling/config.json", "tpshard.json",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "source", "tiny.yaml"]


def test_a_shard_file_describes_itself(source: Path, policy: str, tmp_path: Path) -> None:
    """Where each tensor's cells lie in the whole can be read from the file alone: a lost manifest is not the end."""
    split(source, tmp_path / "s", 6, policy)
    whole = load(source / "model.safetensors")
    for rank in range(6):
        path = shard_file(tmp_path / "s", rank, 6)
        said = metadata_of(path)
        assert {key: said[key] for key in said if key not in ("tpshard.slices", "tpshard.tensors")} == {
            "format": "pt", "tpshard.version": "1", "tpshard.rank": str(rank), "tpshard.ranks": "6",
            "tpshard.part": "0", "tpshard.parts": "1", "tpshard.mesh": '{"pp":1,"ep":1,"tp":6}',
        }  # fmt: skip
        slices, place = json.loads(said["tpshard.slices"]), json.loads(said["tpshard.tensors"])
        for name, held in load(path).items():
            described = slices[place[name]]
            assert tuple(described["shape"]) == whole[name].shape
            index = [
                np.concatenate([np.arange(*run) for run in described.get(str(axis), [[0, size]])] or [[]]).astype(int)
                for axis, size in enumerate(whole[name].shape)
            ]
            covered = held.array()[tuple(slice(len(own)) for own in index)]
            assert np.array_equal(covered, whole[name].array()[np.ix_(*index)]), name


def test_nothing_depends_on_workers(source: Path, policy: str, tmp_path: Path) -> None:
    trees = [tree(split(source, tmp_path / f"s{workers}", 6, policy, workers=workers)) for workers in (1, 2, 5)]
    assert trees[0] == trees[1] == trees[2]


def test_nothing_depends_on_where_or_when(source: Path, policy: str, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "elsewhere" / "copy")
    assert tree(split(source, tmp_path / "a", 3, policy)) == tree(
        split(tmp_path / "elsewhere" / "copy", tmp_path / "elsewhere" / "b", 3, policy)
    )


@pytest.mark.parametrize("algorithm", ["xxh3-128", "blake3", "sha256"])
def test_the_manifest_has_the_digests(source: Path, policy: str, tmp_path: Path, algorithm: str) -> None:
    split(source, tmp_path / "s", 3, policy, digest=algorithm)
    manifest = json.loads((tmp_path / "s" / "tpshard.json").read_text())
    assert manifest["digest"] == {"xxh3-128": "xxh3-128-tree"}.get(algorithm, algorithm)
    new_hasher = {"xxh3-128": xxhash.xxh3_128, "sha256": hashlib.sha256, "blake3": blake3.blake3}[algorithm]
    for record in manifest["carried"]:
        content = (tmp_path / "s" / record["name"]).read_bytes()
        assert (record["size"], record["digest"]) == (len(content), new_hasher(content).hexdigest())
    whole = load(source / "model.safetensors")
    own = [load(tmp_path / "s" / record["name"]) for record in manifest["files"]]
    for record, tensors in zip(manifest["files"], own, strict=True):
        content = (tmp_path / "s" / record["name"]).read_bytes()
        if algorithm == "xxh3-128":
            data_start = 8 + int.from_bytes(content[:8], "little")
            said = json.loads(content[8:data_start])
            names = sorted(tensors, key=lambda name: said[name]["data_offsets"])
            parts = [content[:data_start], *(tensors[name].data for name in names)]
            content = b"".join(xxhash.xxh3_128(part).digest() for part in parts)
        assert record["digest"] == new_hasher(content).hexdigest()
    for record in manifest["tensors"]:
        name = record["name"]
        assert record["digest"] == xxhash.xxh3_128(whole[name].data).hexdigest()
        for rank, digest in enumerate(record.get("shards", [])):
            if digest is not None:
                assert digest == xxhash.xxh3_128(own[rank][name].data).hexdigest()
    merge(tmp_path / "s", tmp_path / "m")


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("engine", [NATIVE, "vllm", "dcp"])
def test_shares_of_several_runs_make_the_whole(
    source: Path, policy: str, tmp_path: Path, runs: int, engine: str
) -> None:
    if engine == "vllm":
        make_checkpoint(tmp_path / "demo")
        source, policy = tmp_path / "demo", "auto"
    planned = plan_split(source, tmp_path / "target", 2 if engine == "vllm" else 3, policy, engine=engine)
    head = Head({}, tuple(output.name for output in planned.plan.outputs))
    with Staging(tmp_path / "a", head) as once, Staging(tmp_path / "b", head) as staging:
        expected = execute(planned.plan, once, "xxh3-128", 2)
        written = []
        for number in range(runs):
            outputs = [output.name for output in planned.plan.outputs[number::runs]]
            share = Share(outputs, range(number, len(planned.plan.items), runs))
            written.append(execute(planned.plan, staging, "xxh3-128", 2, share=share))
            assert [record.name for record in written[-1].files] == sorted(outputs)
        found = functools.reduce(Written.joined, written)
        assert (found.digests, found.shards) == (expected.digests, expected.shards)
        assert sorted(found.files, key=str) == sorted(expected.files, key=str)
        assert tree(once.folder) == tree(staging.folder)


def test_a_share_reads_only_what_it_needs(source: Path, policy: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A rank of a column-cut tensor: its rows, and nothing of the others'."""
    read: list[tuple[int, int]] = []
    preadv = os.preadv

    def watched(fd: int, buffers: Any, offset: int) -> int:
        count = preadv(fd, buffers, offset)
        read.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", watched)
    planned = plan_split(source, tmp_path / "target", 3, policy)
    with Staging(tmp_path / "a", Head({}, (planned.plan.outputs[1].name,))) as staging:
        execute(planned.plan, staging, "xxh3-128", 1, share=Share([planned.plan.outputs[1].name], ()))
        own = load(staging.folder / planned.plan.outputs[1].name)
    whole = load(source / "model.safetensors")
    wanted = 0
    for name, held in whole.items():
        rows, own_rows = held.shape[0], own[name].shape[0]
        cut_by_rows = own_rows != rows
        needed = (
            min(own_rows, rows - own_rows) if cut_by_rows else rows
        )  # rank 1 begins where rank 0 ended; then padding
        wanted += len(held.data) // rows * needed
    assert sum(count for _, count in read) == wanted


@pytest.mark.parametrize("limit", [1, 3000, 60_000, 10**9])
def test_parts_of_a_size(source: Path, policy: str, tmp_path: Path, limit: int) -> None:
    split(source, tmp_path / "s", 3, policy, max_shard_size=limit)
    manifest = json.loads((tmp_path / "s" / "tpshard.json").read_text())
    parts = 1 + max(record["part"] for record in manifest["files"])
    assert (parts == 1) == (limit == 10**9)
    for record in manifest["files"]:
        held = load(tmp_path / "s" / record["name"])
        assert len(held) == 1 or sum(len(own.data) for own in held.values()) <= limit
        expected = f"rank-{record['rank']:05d}-of-00003"
        if parts > 1:
            expected += f"-part-{record['part'] + 1:05d}-of-{parts:05d}"
        assert record["name"] == f"{expected}.safetensors"
    merge(tmp_path / "s", tmp_path / "m")
    assert tree(tmp_path / "m") == tree(source)


# ---------------------------------------------------------------------------------------------- merge and reshard


@pytest.mark.parametrize(("kv_heads", "ranks"), KV_AND_RANKS)
@pytest.mark.parametrize("files", [1, 3])
def test_merge_is_the_source_byte_for_byte(tmp_path: Path, kv_heads: int, ranks: int, files: int) -> None:
    """Carried files and the index included."""
    tiny_checkpoint(tmp_path / "m", kv_heads, files=files)
    split(tmp_path / "m", tmp_path / "s", ranks, policy_file(tmp_path))
    merge(tmp_path / "s", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "m")


@pytest.mark.parametrize("start", [1, 3, 6])
@pytest.mark.parametrize("end", [1, 3, 6])
@pytest.mark.parametrize("limit", [None, 30_000])
def test_reshard_is_a_split(source: Path, policy: str, tmp_path: Path, start: int, end: int, limit: int | None) -> None:
    """Every file, manifest included, whichever way one came."""
    split(source, tmp_path / "start", start, policy)
    direct = split(source, tmp_path / "direct", end, policy, max_shard_size=limit)
    assert tree(reshard(tmp_path / "start", tmp_path / "end", end, max_shard_size=limit)) == tree(direct)


def test_reshard_by_another_policy(source: Path, policy: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        f"name: other\nextends: tiny\nrules: {{lm_head: replicate}}\n---\n{POLICY}".replace("vars:\n", "vars:\n")
    )
    other.write_text(
        other.read_text()
        .replace("name: other\n", "name: other\nfor: {model_type: tiny}\n")
        .replace("name: tiny\nfor: {model_type: tiny}\n", "name: tiny\n")
    )
    split(source, tmp_path / "s", 3, policy)
    direct = split(source, tmp_path / "direct", 6, str(other))
    assert tree(reshard(tmp_path / "s", tmp_path / "end", 6, str(other))) == tree(direct)
    assert tree(reshard(tmp_path / "end", tmp_path / "back", 3, policy)) == tree(tmp_path / "s")
    assert tree(merge(tmp_path / "end", tmp_path / "m")) == tree(source)


def test_merge_into_files_of_a_size(source: Path, policy: str, tmp_path: Path) -> None:
    split(source, tmp_path / "s", 3, policy)
    merge(tmp_path / "s", tmp_path / "m", max_shard_size=50_000)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 3
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    whole = load(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(len(held.data) for held in whole.values())
    assert set(index["weight_map"]) == set(whole)
    found = {name: held for file in files for name, held in load(tmp_path / "m" / file).items()}
    assert found == whole
    for name, file in index["weight_map"].items():
        assert name in load(tmp_path / "m" / file)
    again = split(tmp_path / "m", tmp_path / "s2", 3, policy)
    assert merge(again, tmp_path / "m2").is_dir()
    assert tree(tmp_path / "m2") == tree(tmp_path / "m")
    merge(again, tmp_path / "one", max_shard_size=10**9)
    assert load(tmp_path / "one" / "model.safetensors") == whole
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_the_real_checkpoint_resharded(real_model: Path, tmp_path: Path) -> None:
    split(real_model, tmp_path / "two", 2, "auto")
    direct = split(real_model, tmp_path / "three", 3, "auto", workers=1)
    resharded = reshard(tmp_path / "two", tmp_path / "again", 3)
    assert set(tree(resharded)) == set(tree(direct))
    for path in direct.rglob("*"):
        if path.is_file():
            assert (resharded / path.relative_to(direct)).read_bytes() == path.read_bytes(), path.name
    for rank in range(3):
        found = safetensors.numpy.load_file(shard_file(direct, rank, 3))
        assert found["encoder.layer.0.attention.self.query.weight"].shape == (128, 384)
    shutil.rmtree(tmp_path)


# ---------------------------------------------------------------------------------------------- dtypes and shapes


def one_tensor(folder: Path, held: Tensor, rule: str) -> str:
    """A checkpoint of one tensor ``w`` and a policy of one rule for it; returns the policy."""
    folder.mkdir(parents=True)
    save(folder / "model.safetensors", {"w": held})
    (folder / "config.json").write_text(json.dumps(config()))
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(f"name: one\nrules:\n  w: {rule}\n")
    return str(path)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("rule", ["column", "row", "replicate", "{rule: column, unit: 4, pad: 8}"])
def test_every_dtype(tmp_path: Path, dtype: str, rule: str) -> None:
    held = tensor(dtype, (16, 24))
    if "pad" in rule:
        rule = "{rule: column, pad: 16}"
    policy = one_tensor(tmp_path / "m", held, rule)
    split(tmp_path / "m", tmp_path / "s", 2, policy)
    found = [load(shard_file(tmp_path / "s", rank, 2))["w"] for rank in range(2)]
    assert [own.dtype for own in found] == [dtype] * 2
    if rule == "replicate":
        assert [own.data for own in found] == [held.data] * 2
    elif "pad" in rule:
        assert [own.data for own in found] == [held.data, bytes(len(held.data))]
        assert [own.shape for own in found] == [(16, 24)] * 2
    elif rule == "column":
        assert [own.data for own in found] == [held.data[: len(held.data) // 2], held.data[len(held.data) // 2 :]]
    else:
        rows = np.frombuffer(held.data, np.uint8).reshape(16, -1)
        assert [own.data for own in found] == [half.tobytes() for half in np.split(rows, 2, axis=1)]
    merge(tmp_path / "s", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "m")
    safetensors.safe_open(shard_file(tmp_path / "s", 1, 2), framework="numpy")


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (1, 1), (2, 0, 3), (1, 7, 1, 2, 3)])
@pytest.mark.parametrize("rule", ["column", "row", "replicate", "{rule: column, dims: .o}", "{rule: column, pad: 3}"])
def test_odd_shapes(tmp_path: Path, shape: tuple[int, ...], rule: str) -> None:
    policy = one_tensor(tmp_path / "m", tensor("I32", shape), rule)
    split(tmp_path / "m", tmp_path / "s", 3, policy)
    reshard(tmp_path / "s", tmp_path / "s2", 2)
    for shards in ("s", "s2"):
        assert tree(merge(tmp_path / shards, tmp_path / f"{shards}-again")) == tree(tmp_path / "m")


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        (
            (2, 6),
            "{rule: row, unit: 3}",
            "w: a cut at element 3 of the last axis falls inside a byte (4 bits an element)",
        ),
        ((4, 3), "column", "w: "),
    ],
)
def test_a_cut_inside_a_byte(tmp_path: Path, shape: tuple[int, ...], rule: str, message: str) -> None:
    """The tensor is named, nothing is left behind."""
    policy = one_tensor(tmp_path / "m", tensor("F4", shape), rule)
    assert message in refused(lambda: split(tmp_path / "m", tmp_path / "s", 2, policy), InputError, tmp_path / "s")


dtypes = st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL", "F16"])
rules = st.sampled_from(
    ["column", "row", "replicate", "{rule: column, pad: 2}", "{rule: row, dims: io}", "{rule: column, dims: .o}",
     "{rule: row, dims: .i.}", "{rule: column, parts: [2, 1], uneven: true}", "{rule: column, unit: 3, uneven: true}"]
)  # fmt: skip


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, Tensor], str]:
    """A few tensors, and a policy with a rule for each that fits."""
    tensors, text = {}, "name: p\nrules:\n"
    for n in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 3, 6, 9]), max_size=4)))
        tensors[f"t{n}"] = tensor(draw(dtypes), shape, n)
        text += f"  t{n}: {draw(rules)}\n"
    return tensors, text


@given(checkpoints(), st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, 1, 50]), st.integers(1, 3))
def test_any_checkpoint_comes_back(
    case: tuple[dict[str, Tensor], str], first: int, second: int, limit: int | None, workers: int
) -> None:
    """Split and merged it is itself; resharded it is a split of the whole. Or it is refused."""
    tensors, text = case
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "m").mkdir()
        save(root / "m" / "model.safetensors", tensors, {"format": "pt"})
        policy = policy_file(root, text)
        try:
            split(root / "m", root / "one", first, policy, max_shard_size=limit, workers=workers)
            split(root / "m", root / "two", second, policy, max_shard_size=limit, workers=workers)
        except PolicyError:
            assume(False)
        assert tree(merge(root / "one", root / "again", workers=workers)) == tree(root / "m")
        assert tree(reshard(root / "one", root / "other", second, max_shard_size=limit)) == tree(root / "two")


# ---------------------------------------------------------------------------------------------- what is damaged


def flip(path: Path, name: str, byte: int) -> None:
    """One bit of one tensor's bytes in a file."""
    raw = bytearray(path.read_bytes())
    data = load(path)[name].data
    at = bytes(raw).index(data) + byte % len(data)
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "rank", "byte"),
    [
        ("model.layers.1.self_attn.q_proj.weight", 0, 0),
        ("model.layers.1.self_attn.q_proj.weight", 2, -1),
        ("model.layers.0.mlp.down_proj.weight", 1, 777),
        ("model.layers.2.mlp.gate_proj.bias", 2, 3),
        ("model.embed_tokens.weight", 1, 12345),
        ("lm_head.weight", 0, -1),
        ("model.norm.weight", 0, 7),
    ],
)
def test_a_flipped_bit_is_found_and_named(
    source: Path, policy: str, tmp_path: Path, name: str, rank: int, byte: int
) -> None:
    split(source, tmp_path / "s", 3, policy)
    flip(shard_file(tmp_path / "s", rank, 3), name, byte)
    for action in (lambda: merge(tmp_path / "s", tmp_path / "m"), lambda: reshard(tmp_path / "s", tmp_path / "m", 6)):
        message = refused(action, InputError, tmp_path / "m")
        assert message.startswith(f"{name}: the rebuilt bytes have digest ")
        assert "(a shard was changed or damaged; tpshard verify tells which)" in message


def test_a_replica_that_is_not_needed_is_not_read(source: Path, policy: str, tmp_path: Path) -> None:
    """Merge takes every cell from the lowest rank that holds it; that all replicas agree is verify's to say."""
    split(source, tmp_path / "s", 3, policy)
    flip(shard_file(tmp_path / "s", 1, 3), "model.norm.weight", 5)
    assert tree(merge(tmp_path / "s", tmp_path / "m")) == tree(source)


def swap_files(folder: Path) -> None:
    one, other = shard_file(folder, 0, 3), shard_file(folder, 1, 3)
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def without(path: Path, name: str) -> None:
    held = load(path)
    del held[name]
    save(path, held, metadata_of(path))


def with_other(path: Path, name: str, other: Tensor) -> None:
    save(path, load(path) | {name: other}, metadata_of(path))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda f: shard_file(f, 1, 3).unlink(), "rank-00001-of-00003.safetensors: is not there"),
    "shard truncated": (lambda f: os.truncate(shard_file(f, 1, 3), 5000), "rank-00001-of-00003.safetensors: "),
    "shard empty": (lambda f: shard_file(f, 1, 3).write_bytes(b""), "rank-00001-of-00003.safetensors: has 0 bytes"),
    "shard longer": (lambda f: shard_file(f, 1, 3).write_bytes(shard_file(f, 1, 3).read_bytes() + b"x"), "rank-00001-of-00003.safetensors: 1 bytes follow"),
    "shard a folder": (lambda f: (shard_file(f, 1, 3).unlink(), shard_file(f, 1, 3).mkdir()), "is not a regular file"),
    "shards exchanged": (swap_files, "the manifest "),
    "tensor missing": (lambda f: without(shard_file(f, 1, 3), "model.norm.weight"), "rank-00001-of-00003.safetensors: has "),
    "tensor of another shape": (lambda f: with_other(shard_file(f, 1, 3), "model.norm.weight", tensor("F32", (4, 11))), "rank-00001-of-00003.safetensors: "),
    "tensor of another type": (lambda f: with_other(shard_file(f, 1, 3), "model.norm.weight", tensor("I32", (44,))), "model.norm.weight: I32 [44] in the file, F32 [44] in the manifest"),
    "tensor too many": (lambda f: with_other(shard_file(f, 1, 3), "x", tensor("F32", (1,))), "rank-00001-of-00003.safetensors: has "),
    "shard of another run": (lambda f: save(shard_file(f, 1, 3), {"a": tensor("F32", (3,))}), "rank-00001-of-00003.safetensors: has "),
    "no manifest": (lambda f: (f / "tpshard.json").unlink(), "tpshard.json"),
    "manifest empty": (lambda f: (f / "tpshard.json").write_text(""), "tpshard.json: is not JSON"),
    "manifest cut off": (lambda f: os.truncate(f / "tpshard.json", 3000), "tpshard.json: is not JSON"),
    "manifest edited": (lambda f: (f / "tpshard.json").write_text((f / "tpshard.json").read_text().replace('"ranks": 3', '"ranks": 4')), "tpshard.json: was changed after it was written (its seal does not match)"),
    "manifest a folder": (lambda f: ((f / "tpshard.json").unlink(), (f / "tpshard.json").mkdir()), "tpshard.json: is not a regular file"),
    "config of the same size": (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("1003", "1004")), "config.json: was changed since the shards were written"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: is not there"),
    "tokenizer a pipe": (lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")), "tokenizer.json: is not there, or not a regular file"),
    "carried folder missing": (lambda f: shutil.rmtree(f / "1_Pooling"), "1_Pooling/config.json: is not there"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES, ids=DAMAGES.keys())
def test_damaged_shard_folders(source: Path, policy: str, tmp_path: Path, case: str) -> None:
    damage, expected = DAMAGES[case]
    split(source, tmp_path / "s", 3, policy)
    damage(tmp_path / "s")
    for action in (
        lambda: merge(tmp_path / "s", tmp_path / "m"),
        lambda: reshard(tmp_path / "s", tmp_path / "m", 6, policy),
    ):
        assert expected in refused(action, InputError, tmp_path / "m")


def sealed(data: dict[str, Any]) -> str:
    """A manifest with a seal that matches, as someone who knows the format would forge it."""
    data.pop("seal", None)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**data, "seal": hashlib.sha256(canonical.encode()).hexdigest()})


def layout_of_all(data: dict[str, Any]) -> dict[str, Any]:
    shape: dict[str, Any] = next(item for item in data["layouts"] if len(item["shape"]) == 2)
    return shape


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda d: d.update(format="x"), "is not a tpshard manifest"),
    "a newer version": (lambda d: d.update(version=2), "version 2, this tpshard reads 1"),
    "version 1.0": (lambda d: d.update(version="1"), "version '1', this tpshard reads 1"),
    "ranks 0": (lambda d: d.update(ranks=0), "ranks is 0"),
    "ranks negative": (lambda d: d.update(ranks=-1), "ranks is -1, not a count"),
    "ranks 1e0": (lambda d: d.update(ranks=1e0), "ranks is 1.0, not a count"),
    "ranks true": (lambda d: d.update(ranks=True), "ranks is True, not a count"),
    "ranks text": (lambda d: d.update(ranks="3"), "ranks is '3', not a count"),
    "a billion ranks": (lambda d: d.update(ranks=10**9, layouts=[], tensors=[], roles=[]), "ranks is 1000000000"),
    "ranks 2": (lambda d: d.update(ranks=2), "the mesh has 3 ranks, ranks is 2"),
    "a mesh of 2": (lambda d: d.update(ranks=2, mesh={"pp": 1, "ep": 1, "tp": 2}), "a layout has not 2 ranks"),
    "a mesh without pp": (lambda d: d.update(mesh={"ep": 1, "tp": 3}), "has not the axes pp, ep, tp"),
    "a mesh of text": (lambda d: d.update(mesh={"pp": "1", "ep": 1, "tp": 3}), "pp is '1', not a count"),
    "no files": (lambda d: d.update(files=[]), "no file is listed for rank 0, part 0"),
    "no tensors": (lambda d: d.update(tensors=[]), "lists no tensors"),
    "no tensors and files": (lambda d: d.update(tensors=[], files=[]), "lists no tensors"),
    "rank twice": (lambda d: d["files"][1].update(rank=0), "a file, or a rank's part, is listed twice"),
    "rank gap": (lambda d: d["files"][1].update(rank=7), "no file is listed for rank 1, part 0"),
    "rank -1": (lambda d: d["files"][1].update(rank=-1), "rank is -1, not a count"),
    "file twice": (lambda d: d["files"][1].update(name=d["files"][0]["name"]), "a file, or a rank's part, is listed twice"),
    "file outside": (lambda d: d["files"][1].update(name="../x.safetensors"), "'../x.safetensors' is not a file name"),
    "file absolute": (lambda d: d["files"][1].update(name="/etc/passwd"), "'/etc/passwd' is not a file name"),
    "file not text": (lambda d: d["files"][1].update(name=3), "'3' is not a file name"),
    "carried outside": (lambda d: d["carried"][0].update(name="../../etc/passwd"), "'../../etc/passwd' is not a path inside the folder"),
    "carried absolute": (lambda d: d["carried"][0].update(name="/etc/passwd"), "is not a path inside the folder"),
    "carried twice": (lambda d: d["carried"].append(d["carried"][0]), "is listed twice"),
    "carried a weight file": (lambda d: d["carried"][0].update(name="model.safetensors"), "model.safetensors"),
    "source outside": (lambda d: d["sources"][0].update(name="../model.safetensors"), "'../model.safetensors' is not a file name"),
    "source twice": (lambda d: d["sources"].append(d["sources"][0]), "is listed twice"),
    "no source": (lambda d: d.update(sources=[]), "a tensor names a source file that is not listed"),
    "metadata not text": (lambda d: d["sources"][0].update(metadata={"a": 1}), "metadata of a source file is not text"),
    "tensor twice": (lambda d: d["tensors"].append(d["tensors"][0]), "a tensor is listed twice"),
    "tensor name a path": (lambda d: d["tensors"][0].update(name="../x"), "tensor name '../x' is a path"),
    "tensor dtype": (lambda d: d["tensors"][0].update(dtype="F128"), "dtype F128 is unknown"),
    "tensor layout": (lambda d: d["tensors"][0].update(layout=99), "is malformed: IndexError"),
    "tensor layout -1": (lambda d: d["tensors"][0].update(layout=-1), "layout is -1, not a count"),
    "tensor role": (lambda d: d["roles"][0].update(rule="colum"), "role {'rule': 'colum'"),
    "tensor shards": (lambda d: d["tensors"][0].update(shards=[None]), "does not list a digest for each of 3 ranks"),
    "digest unknown": (lambda d: d.update(digest="md5"), "digest 'md5' is unknown"),
    "field missing": (lambda d: d.pop("files"), "is malformed: KeyError 'files'"),
    "field of another kind": (lambda d: d.update(tensors={"a": 1}), "is malformed: "),
    "runs overlap": (lambda d: next(s for i in d["layouts"] for s in i["shards"] if s["spans"]).update(spans={"0": [[5, 9], [0, 3]]}), "is malformed: ValueError axis 0: runs"),
    "runs beyond the tensor": (lambda d: next(s for i in d["layouts"] for s in i["shards"] if s["spans"]).update(spans={"0": [[0, 10**6]]}, shape=[10**6, 44]), "is malformed: ValueError"),
    "run negative": (lambda d: next(s for i in d["layouts"] for s in i["shards"] if s["spans"]).update(spans={"0": [[-5, 9]]}), "run is -5, not a count"),
    "axis of text": (lambda d: next(s for i in d["layouts"] for s in i["shards"] if s["spans"]).update(spans={"1e0": [[0, 1]]}), "is malformed: ValueError"),
    "axis -1": (lambda d: next(s for i in d["layouts"] for s in i["shards"] if s["spans"]).update(spans={"-1": [[0, 1]]}), "axis "),
    "cells nobody holds": (lambda d: [s.update(spans={"0": [[0, 1]]}) for i in d["layouts"] for s in i["shards"] if "0" in s["spans"]], ""),
    "verified: true": (lambda d: d.update(verified=True), "field"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED, ids=FORGED.keys())
def test_forged_manifests(source: Path, policy: str, tmp_path: Path, case: str) -> None:
    forge, expected = FORGED[case]
    path = split(source, tmp_path / "s", 3, policy) / "tpshard.json"
    data = json.loads(path.read_text())
    forge(data)
    path.write_text(sealed(data))
    message = refused(lambda: merge(tmp_path / "s", tmp_path / "m"), InputError, tmp_path / "m")
    assert expected in message
    refused(lambda: reshard(tmp_path / "s", tmp_path / "m", 6, policy), InputError, tmp_path / "m")


def test_an_honest_forger_is_believed(source: Path, policy: str, tmp_path: Path) -> None:
    """The forging above is what is refused, not the way in which it is written."""
    path = split(source, tmp_path / "s", 3, policy) / "tpshard.json"
    path.write_text(sealed(json.loads(path.read_text())))
    assert tree(merge(tmp_path / "s", tmp_path / "m")) == tree(source)


# ---------------------------------------------------------------------------------------------- while it runs


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (rewrite, StorageError),
        (replace, StorageError),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), StorageError),
        (lambda path: os.truncate(path, 2000), StorageError),
        (lambda path: path.unlink(), StorageError),
    ],
    ids=["rewritten", "replaced", "longer", "truncated", "removed"],
)
def test_a_source_that_changes_during_the_run(
    source: Path,
    policy: str,
    tmp_path: Path,
    change: Callable[[Path], object],
    kind: type[TpshardError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the first byte that is read; the output is not published."""
    monkeypatch.setattr("tpshard.execute.SLAB", 1000)
    changed = []

    def progress(_: int) -> None:
        if not changed:
            changed.append(change(source / "model.safetensors"))

    message = refused(lambda: split(source, tmp_path / "s", 3, policy, progress=progress), kind, tmp_path / "s")
    assert "model.safetensors: " in message


# ---------------------------------------------------------------------------------------------- what is asked wrongly


def test_the_wrong_command(source: Path, policy: str, tmp_path: Path) -> None:
    split(source, tmp_path / "s", 3, policy)
    message = refused(lambda: split(tmp_path / "s", tmp_path / "x", 3, policy), UsageError, tmp_path / "x")
    assert "is a shard folder already (tpshard reshard cuts it for other ranks)" in message
    assert "tpshard.json" in refused(lambda: merge(source, tmp_path / "x"), InputError, tmp_path / "x")
    assert "tpshard.json" in refused(lambda: reshard(source, tmp_path / "x", 3), InputError, tmp_path / "x")


@pytest.mark.parametrize("tp", [0, -1, 2, 4, 5, 4097, 10**9])
def test_ranks_that_cannot_be(source: Path, policy: str, tmp_path: Path, tp: int) -> None:
    kind = UsageError if not 1 <= tp <= 4096 else PolicyError
    refused(lambda: split(source, tmp_path / "s", tp, policy), kind, tmp_path / "s")


def test_quantised_checkpoints(source: Path, policy: str, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps(config(quantization_config={"quant_method": "gptq"})))
    message = refused(lambda: split(source, tmp_path / "s", 3, policy), InputError, tmp_path / "s")
    assert "config.json says gptq, but no tensor is quantised (take its quantization_config away" in message


def test_unknown_digest(source: Path, policy: str, tmp_path: Path) -> None:
    message = refused(lambda: split(source, tmp_path / "s", 3, policy, digest="md5"), UsageError, tmp_path / "s")
    assert "digest 'md5' is unknown" in message


def test_nan_weights_are_copied_as_they_are(tmp_path: Path) -> None:
    held = Tensor("F32", (6,), np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45], np.float32).tobytes())
    policy = one_tensor(tmp_path / "m", held, "column")
    split(tmp_path / "m", tmp_path / "s", 2, policy)
    assert tree(merge(tmp_path / "s", tmp_path / "again")) == tree(tmp_path / "m")


def test_hard_links_to_the_source_are_not_written_through(source: Path, policy: str, tmp_path: Path) -> None:
    os.link(source / "model.safetensors", tmp_path / "linked")
    before = (tmp_path / "linked").read_bytes()
    split(source, tmp_path / "s", 3, policy)
    assert (tmp_path / "linked").read_bytes() == before
    assert shard_file(tmp_path / "s", 0, 3).stat().st_nlink == 1


def test_what_the_plan_says_is_what_is_written(source: Path, policy: str, tmp_path: Path) -> None:
    conversion = plan_split(source, tmp_path / "s", 6, policy)
    done = run(conversion)
    assert conversion.disk_needed == sum(
        len(held.data) for rank in range(6) for held in load(shard_file(tmp_path / "s", rank, 6)).values()
    )
    assert done.bytes_written == sum(shard_file(tmp_path / "s", rank, 6).stat().st_size for rank in range(6))
    assert done.bytes_read == (source / "model.safetensors").stat().st_size
    assert done.tensors == len(load(source / "model.safetensors"))
    shard = conversion.plan.items[-1].want.shards[5]
    assert isinstance(shard, Shard)
    assert all(isinstance(run, Span) for runs in shard.spans for run in runs)
    assert set(NUMPY) <= set(BITS)
