"""Distributed checkpoints: PyTorch writes and tpshard reads, tpshard writes and PyTorch loads."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.build import Tensor, load, save
from tpshard.checkpoint import Checkpoint
from tpshard.chunks import check_tiled
from tpshard.dcp import is_dcp, open_dcp, read_dcp
from tpshard.dcp_metadata import Chunk, Described, Extent, parse_dcp_metadata, read_dcp_metadata
from tpshard.dcp_names import chosen_names
from tpshard.dcp_writing import metadata_bytes, plan_dcp_safetensors, plan_distcp, sharding_info
from tpshard.errors import InputError
from tpshard.execute import execute
from tpshard.header import DTYPE_BITS
from tpshard.journal import Head
from tpshard.layout import Box, Layout, Span
from tpshard.plan import Item, Output, Plain, Plan
from tpshard.sources import SourceFiles
from tpshard.staging import Staging

torch = pytest.importorskip("torch")
ranks_script = pytest.importorskip("tests.dcp_ranks")
KINDS = ("flat", "nested", "hf")


def by_torch(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.dcp_ranks", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/{3,4}/{flat,nested,hf}, written by PyTorch on 3 ranks and on a mesh of 2 by 2."""
    folder = tmp_path_factory.mktemp("dcp")
    by_torch("save", str(folder))
    return folder


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    """A copy of what 3 ranks wrote, to be damaged."""
    return Path(shutil.copytree(saved / "3", tmp_path / "own"))


def raw(tensor: Any) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="session")
def truth() -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in ranks_script.whole().items()}


def assembled(checkpoint: Checkpoint, name: str) -> bytes:
    """A whole tensor, shard by shard, by NumPy."""
    stored = checkpoint.tensors[name]
    width = DTYPE_BITS[stored.dtype] // 8
    whole = np.full((*stored.shape, width), 255, np.uint8)
    with SourceFiles(checkpoint) as files:
        for rank, shard in enumerate(stored.layout.shards):
            if shard is None:
                continue
            room = np.empty(shard.volume * width, np.uint8)
            files.read(stored, rank, 0, room)
            for piece in shard.pieces():
                whole[piece.box.slices()] = room.reshape((*shard.shape, width))[piece.local.slices()]
    return whole.tobytes()


def written(plan: Plan, folder: Path, workers: int = 2) -> Path:
    beside = getattr(plan.arrangement, "beside", lambda plan: {})(plan)
    with Staging(folder, Head({}, (*(output.name for output in plan.outputs), *beside))) as staging:
        execute(plan, staging, "xxh3-128", workers)
        for name, content in beside.items():
            staging.write(name, content)
        staging.sync()
        staging.commit()
    return folder


def merged(checkpoint: Checkpoint, folder: Path) -> dict[str, Tensor]:
    items = tuple(Item(tensor, Layout.replicated(tensor.shape, 1)) for tensor in checkpoint.tensors.values())
    outputs = (Output("model.safetensors", 0, 0, 0, len(items)),)
    plan = Plan(checkpoint, items, outputs, 1, Plain(lambda output: {"format": "pt"}))
    return load(written(plan, folder) / "model.safetensors")


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("ranks", ["3", "4"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_pytorch_saved_is_read_and_merged(
    saved: Path, truth: dict[str, bytes], ranks: str, kind: str, tmp_path: Path
) -> None:
    folder = saved / ranks / kind
    assert is_dcp(folder)
    checkpoint = open_dcp(folder)
    assert sorted(checkpoint.tensors) == sorted(truth)
    for name, expected in truth.items():
        assert assembled(checkpoint, name) == expected, name
        assert checkpoint.tensors[name].shape == ranks_script.SHAPES[name][1]
    assert {name: held.data for name, held in merged(checkpoint, tmp_path / "full").items()} == truth
    if kind == "nested":
        assert checkpoint.warnings == ("left out, with its tensors: app.optim (1), step (1)",)
    else:
        assert checkpoint.warnings == ()


@pytest.mark.parametrize("ranks", ["3", "4"])
def test_metadata_says_what_pytorch_unpickles(saved: Path, ranks: str) -> None:
    path = saved / ranks / "nested" / ".metadata"
    ours, theirs = read_dcp_metadata(path), pickle.loads(path.read_bytes())
    where = {(key.fqn, key.offset and tuple(key.offset)): value for key, value in theirs.storage_data.items()}
    assert set(ours.tensors) | set(ours.objects) == set(theirs.state_dict_metadata)
    for name, tensor in ours.tensors.items():
        there = theirs.state_dict_metadata[name]
        assert tensor.shape == tuple(there.size)
        assert [(c.box.start, c.box.shape) for c in tensor.chunks] == [
            (tuple(c.offsets), tuple(c.sizes)) for c in there.chunks if 0 not in c.sizes
        ]
        for chunk in tensor.chunks:
            info = where[name, chunk.box.start or ()] if chunk.box.start else where[name, there.chunks[0].offsets]
            assert chunk.extent == Extent(info.relative_path, info.offset, info.length)
    assert ours.paths == {name: tuple(map(str, path)) for name, path in theirs.planner_data.items()}
    assert set(ours.objects) == {"app.optim.lr", "rng"}


def test_a_tensor_that_does_not_lie_in_order_is_read(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    turned = torch.arange(35, dtype=torch.int32).reshape(5, 7).t()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.save({"turned": turned}, storage_writer=dcp.FileSystemWriter(tmp_path / "turned"), no_dist=True)
    assert assembled(open_dcp(tmp_path / "turned"), "turned") == raw(turned)


def test_which_names_are_the_weights() -> None:
    def names(paths: dict[str, tuple[str, ...]], key: str | None = None) -> list[str]:
        return sorted(chosen_names(list(paths), [], paths, key, "x").full)

    flat = {"model.a": ("model.a",), "lm_head": ("lm_head",)}  # a Hugging Face model's own state dict
    assert names(flat) == ["lm_head", "model.a"]
    assert names({"model.model.a": ("model", "model.a"), "step": ("step",)}) == ["model.a"]
    titan = {"tok.weight": ("tok.weight",), "optimizer.tok.exp": ("optimizer", "tok.exp")}
    assert names(titan) == ["tok.weight"]
    two = {"actor.a": ("actor", "a"), "critic.a": ("critic", "a")}
    assert names(two) == ["actor.a", "critic.a"]
    assert names(two, "critic") == ["a"]
    with pytest.raises(InputError, match="no tensors under 'c' .it holds tensors under actor, critic"):
        names(two, "c")
    with pytest.raises(InputError, match="no weights, but tensors under optim"):
        names({"optim.a": ("optim", "a")})


# ---------------------------------------------------------------------------------------------- writing


def layouts(checkpoint: Checkpoint) -> dict[str, Layout]:
    """On 2 ranks: fused parts in which rank 1 comes first, padding, overlapping copies, columns, copies."""
    found = {name: Layout.replicated(tensor.shape, 2) for name, tensor in checkpoint.tensors.items()}
    q, o, few = "model.layers.0.q.weight", "model.layers.0.o.weight", "model.few.weight"
    found[q] = Layout.along((7, 5), 0, [(Span(2, 4), Span(5, 7)), (Span(0, 2), Span(4, 5))], [4, 6])
    found[o] = Layout.along((6, 11), 1, [(Span(0, 4),), (Span(4, 11),)], [7, 7])
    found[few] = Layout.along((4, 3), 0, [(Span(0, 3),), (Span(1, 4),)], [3, 3])
    return found


@pytest.fixture(scope="session")
def ours(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both kinds, as tpshard writes them."""
    folder, source = tmp_path_factory.mktemp("ours"), open_dcp(saved / "3" / "flat")
    plans = {"dcp": plan_distcp, "dcp-hf": plan_dcp_safetensors}
    return {kind: written(make(source, layouts(source), 2), folder / kind) for kind, make in plans.items()}


def test_the_files_are_those_of_pytorch(ours: dict[str, Path]) -> None:
    assert sorted(path.name for path in ours["dcp"].iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert sorted(path.name for path in ours["dcp-hf"].iterdir()) == [
        f"shard-0000{rank}-model-0000{turn}-of-00002.safetensors" for rank in (1, 2) for turn in (1, 2)
    ]


@pytest.mark.parametrize("kind", ["dcp", "dcp-hf"])
def test_pytorch_loads_whole_tensors_of_what_is_written(
    ours: dict[str, Path], truth: dict[str, bytes], kind: str
) -> None:
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader if kind == "dcp" else dcp.HuggingFaceStorageReader
    into = {name: tensor.clone().fill_(1) for name, tensor in ranks_script.whole().items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.load(into, storage_reader=reader(str(ours[kind])), no_dist=True)
    assert {name: raw(tensor) for name, tensor in into.items()} == truth
    assert {name: assembled(open_dcp(ours[kind]), name) for name in truth} == truth


def test_pytorch_makes_one_file_of_what_is_written(
    ours: dict[str, Path], truth: dict[str, bytes], tmp_path: Path
) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp_to_torch_save(ours["dcp"], tmp_path / "all.pt")
    assert {name: raw(t) for name, t in torch.load(tmp_path / "all.pt").items()} == truth


def test_ranks_load_what_is_written_into_another_mesh(ours: dict[str, Path]) -> None:
    by_torch("load", *map(str, ours.values()))


def test_same_bytes_again_with_other_workers(ours: dict[str, Path], saved: Path, tmp_path: Path) -> None:
    source = open_dcp(saved / "4" / "hf")  # other chunks of the same tensors
    for kind, make in (("dcp", plan_distcp), ("dcp-hf", plan_dcp_safetensors)):
        again = written(make(source, layouts(source), 2), tmp_path / kind, workers=1)
        for path in ours[kind].iterdir():
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_checksums_inside_are_right(ours: dict[str, Path], tmp_path: Path) -> None:
    import zipfile

    for tensor in read_dcp_metadata(ours["dcp"] / ".metadata").tensors.values():
        for chunk in tensor.chunks:
            begin, end = chunk.extent.offset, chunk.extent.offset + chunk.extent.length
            (tmp_path / "part.zip").write_bytes((ours["dcp"] / chunk.extent.file).read_bytes()[begin:end])
            assert zipfile.ZipFile(tmp_path / "part.zip").testzip() is None


# ---------------------------------------------------------------------------------------------- what is refused


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_dcp(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed_metadata(folder: Path, change: Any) -> Path:
    """By PyTorch's own classes."""
    path = folder / ".metadata"
    said = pickle.loads(path.read_bytes())
    change(said)
    path.write_bytes(pickle.dumps(said))
    return folder


def chunk_of(said: Any, offset: tuple[int, ...]) -> Any:
    return next(k for k in said.storage_data if k.fqn == "model.layers.0.q.weight" and tuple(k.offset) == offset)


def test_a_missing_file_is_refused(own: Path) -> None:
    (own / "flat" / "__1_0.distcp").unlink()
    assert "__1_0.distcp: is not there (.metadata names it)" in refused(own / "flat")
    (own / "hf" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    assert "cells [3, 0] to [5, 4] of shape [7, 5] are in no chunk (a file is missing" in refused(own / "hf")


def test_a_missing_chunk_is_refused(own: Path) -> None:
    def drop_stored(said: Any) -> None:
        del said.storage_data[chunk_of(said, (3, 0))]

    def drop_both(said: Any) -> None:
        drop_stored(said)
        del said.state_dict_metadata["model.layers.0.q.weight"].chunks[1]

    path = own / "flat"
    before = (path / ".metadata").read_bytes()
    assert "q.weight: its chunk at [3, 0] is stored in no file" in refused(changed_metadata(path, drop_stored))
    (path / ".metadata").write_bytes(before)
    assert "cells [3, 0] to [5, 4] of shape [7, 5] are in no chunk" in refused(changed_metadata(path, drop_both))


def test_a_chunk_that_no_tensor_has_is_refused(own: Path) -> None:
    def drop(said: Any) -> None:
        del said.state_dict_metadata["model.layers.0.q.weight"].chunks[1]

    assert "a chunk at (3, 0) is stored that no tensor has" in refused(changed_metadata(own / "flat", drop))


def test_what_the_file_holds_must_be_what_the_metadata_says(own: Path) -> None:
    def move(said: Any) -> None:
        first, second = (said.storage_data[chunk_of(said, offset)] for offset in ((0, 0), (6, 0)))
        first.relative_path, first.offset, first.length = second.relative_path, second.offset, second.length

    message = refused(changed_metadata(own / "flat", move))
    assert "holds F32 [1, 5]" in message
    assert "says F32 [3, 5] (were files of two runs mixed?)" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("relative_path", "../__0_0.distcp", "'../__0_0.distcp' is not a file name"),
        ("relative_path", "/etc/passwd", "'/etc/passwd' is not a file name"),
        ("offset", -1, "range of bytes that is none"),
        ("length", 2**40, "a part ends at"),
        ("length", 900, "does not end as a zip file does"),
        ("transform_descriptors", ["zstd"], "compressed or otherwise transformed"),
    ],
)
def test_where_a_chunk_lies_is_checked(own: Path, field: str, value: object, message: str) -> None:
    def change(said: Any) -> None:
        setattr(said.storage_data[chunk_of(said, (0, 0))], field, value)

    assert message in refused(changed_metadata(own / "flat", change))


def test_every_cut_of_the_metadata_is_refused(saved: Path) -> None:
    whole = (saved / "3" / "flat" / ".metadata").read_bytes()
    for size in range(0, len(whole), 61):
        with pytest.raises(InputError):
            parse_dcp_metadata(whole[:size], "x")


class _Runs:
    """What a hostile file would do when it is unpickled."""

    def __init__(self, call: Any, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call, self.arguments


def hostile() -> Iterator[object]:
    import builtins
    import os

    yield _Runs(os.system, "touch ran")
    yield _Runs(builtins.eval, "open('ran', 'w')")
    yield _Runs(getattr, _Runs(getattr, b"", "join"), "x")
    yield [_Runs(os.mkdir, "ran")]


@pytest.mark.parametrize("value", list(hostile()))
@pytest.mark.parametrize("place", ["top", "planner_data", "key"])
def test_a_hostile_pickle_runs_nothing(
    own: Path, value: object, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = own / "flat" / ".metadata"
    said = pickle.loads(path.read_bytes())
    if place == "top":
        said = value
    elif place == "planner_data":
        said.planner_data = value
    else:
        said.storage_data[chunk_of(said, (0, 0))] = value
    path.write_bytes(pickle.dumps(said))
    if place == "planner_data" and value.__class__ is _Runs and value.call is getattr:  # type: ignore[attr-defined]
        assert open_dcp(own / "flat").tensors  # kept as a record, and not asked for
    else:
        refused(own / "flat")
    assert not (tmp_path / "ran").exists()


def test_copies_must_be_equal(own: Path, tmp_path: Path) -> None:
    first = own / "hf" / "shard-00001-model-00001-of-00001.safetensors"
    held = load(first)["model.layers.0.q.weight"]
    info = sharding_info({"model.layers.0.q.weight": (0, 0)})
    save(own / "hf" / "copy.safetensors", {"model.layers.0.q.weight": held}, info)
    assert open_dcp(own / "hf").tensors["model.layers.0.q.weight"].layout.shards[3:] == ()
    other = bytes([held.data[0] ^ 1, *held.data[1:]])
    save(own / "hf" / "copy.safetensors", {"model.layers.0.q.weight": Tensor("F32", held.shape, other)}, info)
    assert "q.weight: the chunk at [0, 0] differs between copy.safetensors and shard-00001" in refused(own / "hf")
    save(own / "hf" / "copy.safetensors", {"model.layers.0.q.weight": held}, sharding_info({held.dtype: ()}))
    assert "DCP_SHARDING_INFO has no saved_offsets for it" in refused(own / "hf")
    moved = sharding_info({"model.layers.0.q.weight": (1, 0)})
    save(own / "hf" / "copy.safetensors", {"model.layers.0.q.weight": held}, moved)
    assert "cells [1, 0] to [2, 4] of shape [7, 5] are in 2 chunks" in refused(own / "hf")


def test_an_ordinary_folder_is_no_distributed_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": Tensor("U8", (2,), b"ab")}, {"format": "pt"})
    assert not is_dcp(tmp_path)
    with pytest.raises(InputError, match="has no DCP_SHARDING_INFO"):
        read_dcp(tmp_path)


def test_chunks_with_too_many_edges_are_refused() -> None:
    boxes = [Box((n, n, n), (n + 1, n + 1, n + 1)) for n in range(400)]
    with pytest.raises(InputError, match="edges at"):
        check_tiled((400, 400, 400), boxes, "x")


def test_float4_counts_bytes_in_pytorch_and_elements_here() -> None:
    chunk = Chunk(Box((0, 6), (3, 14)), Extent("__0_0.distcp", 0, 9))
    first = Chunk(Box((0, 0), (3, 6)), Extent("__0_0.distcp", 9, 9))
    said = {"a": Described("F4", (3, 14), (first, chunk))}
    data = metadata_bytes(said)
    theirs = pickle.loads(data)
    assert tuple(theirs.state_dict_metadata["a"].size) == (3, 7)
    assert theirs.state_dict_metadata["a"].properties.dtype == torch.float4_e2m1fn_x2
    assert parse_dcp_metadata(data, "x").tensors == said
