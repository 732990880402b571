"""PyTorch files that we write, as torch and zipfile read them."""

from __future__ import annotations

import argparse
import itertools
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.torch_fixtures import DTYPES, a_tensor, bytes_of, loaded, same, write_frame
from tpshard.errors import InputError
from tpshard.frames import Tensor
from tpshard.pickle_machine import Call, Global
from tpshard.torch_files import read_torch_tree
from tpshard.torch_frames import torch_frame
from tpshard.torch_state import read_torch_file, tensors_under


def described(tensors: dict[str, torch.Tensor]) -> list[Tensor]:
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    return [Tensor(name, kinds[held.dtype], tuple(held.shape)) for name, held in tensors.items()]


def write(path: Path, tensors: dict[str, torch.Tensor], tree: object = None) -> Path:
    write_frame(path, torch_frame(described(tensors), {}, tree), [bytes_of(held) for held in tensors.values()])
    return path


def check(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """By torch in three ways, by zipfile, and by our own reader."""
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    for found in (loaded(path), torch.load(path, weights_only=False, mmap=False)):
        assert list(found) == list(tensors)
        for name, held in tensors.items():
            assert (found[name].dtype, found[name].shape) == (held.dtype, held.shape)
            assert bytes_of(found[name]) == bytes_of(held)
    same(path, read_torch_file(path).header.entries, tensors)


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {f"t.{name}": a_tensor(name, (3, 5, 2), seed) for seed, name in enumerate(DTYPES)}
    check(write(tmp_path / "x.pt", tensors), tensors)


def test_float4(tmp_path: Path) -> None:
    data = a_tensor("U8", (3, 5))
    write_frame(tmp_path / "x.pt", torch_frame([Tensor("a", "F4", (3, 10))], {}), [bytes_of(data)])
    assert loaded(tmp_path / "x.pt")["a"].dtype == torch.float4_e2m1fn_x2
    assert torch.equal(loaded(tmp_path / "x.pt")["a"].view(torch.uint8), data)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4)), max_size=6),
    st.text("abc/é", max_size=70),
)
@settings(max_examples=60)
def test_any_tensors(tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]], name: str) -> None:
    tensors = {f"t{name}{seed}": a_tensor(dtype, shape, seed) for seed, (dtype, shape) in enumerate(kinds)}
    path = write(tmp_path_factory.mktemp("frame") / "x.pt", tensors)
    if tensors:
        check(path, tensors)
    else:
        assert loaded(path) == {}


def test_the_layout_is_torchs_own(tmp_path: Path) -> None:
    """Places that torch computes by its own writer's rule must be ours; tensors begin at multiples of 64."""
    tensors = {f"{seed}": a_tensor("BF16", (seed,), seed) for seed in range(40)}
    path = write(tmp_path / "x.pt", tensors)
    frame = torch_frame(described(tensors), {})
    assert all(start % 64 == 0 for start in frame.starts)
    meta = torch.load(path, weights_only=True, map_location="meta")
    assert tuple(held.untyped_storage()._checkpoint_offset for held in meta.values()) == frame.starts
    saved = tmp_path / "archive.pt"  # torch's own, of the same archive name
    torch.save(tensors, saved)
    entries = read_torch_file(saved).header.entries
    steps = [second - first for first, second in itertools.pairwise(frame.starts)]
    theirs = [entries[f"{seed}"].offset for seed in range(40)]
    assert steps[1:] == [second - first for first, second in itertools.pairwise(theirs)][1:]


def test_a_tree_around_the_tensors(tmp_path: Path) -> None:
    """Megatron's, whose arguments must be a Namespace for its own loader."""
    tensors = {"b": a_tensor("BF16", (3, 5)), "a": a_tensor("F32", (7,))}
    first, second = described(tensors)
    names = {"hidden_size": 48, "rate": 0.5, "paths": ["x"], "none": None, "dtype": Global("torch", "bfloat16")}
    value: dict[str, Any] = {
        "args": Call(Global("argparse", "Namespace"), (), names),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {"encoder": {"a": second, "b": first, "tied": second}},
    }
    path = write(tmp_path / "x.pt", tensors, value)
    with torch.serialization.safe_globals([argparse.Namespace]):
        safe = loaded(path)
    for found in (safe, torch.load(path, weights_only=False)):
        assert found["args"] == argparse.Namespace(**{**names, "dtype": torch.bfloat16})
        assert (found["checkpoint_version"], found["iteration"]) == (3.0, 7)
        assert torch.equal(found["model"]["encoder"]["a"], tensors["a"])
        assert found["model"]["encoder"]["tied"].data_ptr() == found["model"]["encoder"]["a"].data_ptr()
        assert torch.equal(found["model"]["encoder"]["b"], tensors["b"])
    torch.load(path, weights_only=False, map_location="meta")  # no promise of computed places: another order
    entries, _ = tensors_under(read_torch_tree(path, None).value["model"], "x")
    assert set(entries) == {"encoder.a", "encoder.b", "encoder.tied"}


def test_what_cannot_be_written(tmp_path: Path) -> None:
    one = Tensor("a", "F32", (3,))
    with pytest.raises(InputError, match="a: PyTorch has no dtype F6_E2M3"):
        torch_frame([Tensor("a", "F6_E2M3", (4,))], {})
    with pytest.raises(ValueError, match="holds 0 of 1 tensors"):
        torch_frame([one], {}, {"x": 1})
    with pytest.raises(ValueError, match="two have one name"):
        torch_frame([one, one], {})
    with pytest.raises(TypeError, match="kind object has no pickle"):
        torch_frame([one], {}, {"a": one, "b": object()})


def test_same_input_same_bytes() -> None:
    tensors = described({"a": a_tensor("F32", (3,)), "b": a_tensor("U16", (5,))})
    assert torch_frame(tensors, {}).fixed == torch_frame(tensors, {"x": "y"}).fixed


def test_checksums_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpshard.torch_frames.PIECE", 7)
    tensors = {"a": a_tensor("U8", (50,)), "b": a_tensor("F32", (3, 7)), "c": a_tensor("F32", (0,))}
    check(write(tmp_path / "x.pt", tensors), tensors)


def test_more_than_4_gib(tmp_path: Path) -> None:
    """A tensor larger than 32 bits count, and one that begins there; the file has holes, so it takes no room."""
    shapes = {"a": (2**30 + 3, 5), "b": (2, 3), "c": (1,)}
    frame = torch_frame([Tensor(name, "U8" if name == "a" else "F32", shape) for name, shape in shapes.items()], {})
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        for place, raw in frame.fixed:
            os.pwrite(file.fileno(), raw, place)
        os.pwrite(file.fileno(), bytes_of(a_tensor("F32", (2, 3))), frame.starts[1])
        os.pwrite(file.fileno(), b"\x07", frame.starts[1] - 2000)  # in a
    found = loaded(path)
    assert {name: tuple(held.shape) for name, held in found.items()} == shapes
    assert torch.equal(found["b"], a_tensor("F32", (2, 3)))
    assert 7 in found["a"].reshape(-1)[-2500:]
    entries = read_torch_file(path).header.entries
    assert tuple(entries[name].offset for name in shapes) == frame.starts
    with zipfile.ZipFile(path) as file:
        assert [entry.file_size for entry in file.infolist() if "/data/" in entry.filename] == [5 * (2**30 + 3), 24, 4]
    meta = torch.load(path, weights_only=True, map_location="meta")
    assert tuple(held.untyped_storage()._checkpoint_offset for held in meta.values()) == frame.starts
