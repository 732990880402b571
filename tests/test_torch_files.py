"""PyTorch's files against torch itself: what it saved is found at the right bytes; what is wrong is refused in a line."""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.build import POLICY, tiny_tensors, tree, write_checkpoint
from tests.build import config as tiny_config
from tests.torch_fixtures import DTYPES, a_tensor, bytes_of, read_entry, same, torch_zip, zip_of
from tpshard import api
from tpshard.checkpoint import open_full
from tpshard.errors import InputError, StorageError
from tpshard.header import Entry
from tpshard.pickle_machine import Call, Global
from tpshard.pickle_writing import Persistent, pickled
from tpshard.torch_files import read_torch_tree
from tpshard.torch_state import TorchFile, read_torch_file, tensors_under

NAMESPACE = Global("argparse", "Namespace")


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_torch_file(path, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path)).lstrip(": ")


# ---------------------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("old", [False, True])
def test_every_dtype(tmp_path: Path, old: bool) -> None:
    """The old format has none of those without a storage of their own; PyTorch cannot load them back either."""
    own = [name for name in DTYPES if not old or not name.startswith(("F8", "U16", "U32", "U64"))]
    tensors = {f"t.{name}": a_tensor(name, (3, 5, 2), seed) for seed, name in enumerate(own)}
    path = saved(tmp_path / "x.pt", tensors, _use_new_zipfile_serialization=not old)
    same(path, read_torch_file(path).header.entries, tensors)
    same(path, read_torch_file(path).header.entries, torch.load(path, weights_only=True))


def test_float4_counts_elements(tmp_path: Path) -> None:
    packed = a_tensor("U8", (3, 5)).view(torch.float4_e2m1fn_x2)
    path = saved(tmp_path / "x.pt", {"a": packed})
    entry = read_torch_file(path).header.entries["a"]
    assert (entry.dtype, entry.shape) == ("F4", (3, 10))
    assert read_entry(path.read_bytes(), entry) == bytes_of(packed.view(torch.uint8))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda t: t,
    "rows": lambda t: t[2:5],
    "columns": lambda t: t[:, 1:3],
    "every other row": lambda t: t[1::2],
    "every third column": lambda t: t[:, ::3],
    "transposed": lambda t: t.transpose(0, 1),
    "permuted": lambda t: t.permute(2, 0, 1)[1],
    "one cell": lambda t: t[3, 2, 1],
    "empty": lambda t: t[:0],
    "empty inside": lambda t: t[:, 2:2],
    "one row expanded from one": lambda t: t[:1].expand(1, 5, 3),
    "diagonal": lambda t: t[:, :, 0].diagonal(),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F64", "U8", "F8_E4M3"])
def test_views(tmp_path: Path, dtype: str, old: bool) -> None:
    if old and dtype == "F8_E4M3":
        dtype = "C64"
    base = a_tensor(dtype, (7, 5, 3))
    tensors = {name: cut(base) for name, cut in VIEWS.items()}
    path = saved(tmp_path / "x.pt", tensors, _use_new_zipfile_serialization=not old)
    found = read_torch_file(path)
    same(path, found.header.entries, tensors)
    assert not any("tie" in warning for warning in found.warnings)


@given(st.data())
@settings(max_examples=60)
def test_any_view(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = a_tensor(
        data.draw(st.sampled_from(["F16", "I32", "BOOL"])), data.draw(st.lists(st.integers(1, 5), max_size=4))
    )
    cut = base
    for axis in range(cut.dim()):
        first = data.draw(st.integers(0, cut.shape[axis]))
        cut = cut.narrow(axis, first, data.draw(st.integers(0, cut.shape[axis] - first)))
        index: list[Any] = [slice(None)] * cut.dim()
        index[axis] = slice(None, None, data.draw(st.integers(1, 3)))
        cut = cut[tuple(index)]
    cut = cut.permute(data.draw(st.permutations(range(cut.dim()))))
    path = saved(tmp_path_factory.mktemp("view") / "x.pt", {"a": cut})
    same(path, read_torch_file(path).header.entries, {"a": cut})


def test_parameters_scalars_ties_and_a_whole_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(5, 3, bias=False))
    module[2].weight = module[0].weight
    state = module.state_dict(keep_vars=True)
    path = saved(tmp_path / "x.pt", state)
    found = read_torch_file(path)
    same(path, found.header.entries, dict(state))
    assert found.warnings == ("one tensor under two names, written under both: 2.weight = 0.weight",)
    assert found.header.entries["1.num_batches_tracked"].shape == ()


def test_a_tensor_with_attributes(tmp_path: Path) -> None:
    held = a_tensor("F32", (3, 2))
    held.kind = "x"  # type: ignore[attr-defined]
    same(path := saved(tmp_path / "x.pt", {"a": held}), read_torch_file(path).header.entries, {"a": held})


def test_safetensors_own_order(tmp_path: Path) -> None:
    tensors = {
        "b": a_tensor("F32", (3,)),
        "a": a_tensor("U8", (5,)),
        "c": a_tensor("I64", (2,)),
        "aa": a_tensor("F32", (7,)),
    }
    assert list(read_torch_file(saved(tmp_path / "x.pt", tensors)).header.entries) == ["c", "aa", "b", "a"]


# ---------------------------------------------------------------------------------------------- which are the weights

A, B, C = a_tensor("F32", (3, 2)), a_tensor("BF16", (5,)), a_tensor("I64", ())
NESTED: dict[str, tuple[Any, dict[str, torch.Tensor], tuple[str, ...]]] = {
    "flat": ({"a": A, "b": B}, {"a": A, "b": B}, ()),
    "state_dict": ({"state_dict": {"a": A}, "epoch": 3}, {"a": A}, ()),
    "model before module": ({"model": {"x": {"a": A}, "y.b": B}, "iteration": 7}, {"x.a": A, "y.b": B}, ()),
    "params": ({"params": collections.OrderedDict(a=A)}, {"a": A}, ()),
    "an optimizer beside": ({"model": {"a": A}, "optimizer": {"state": {0: {"exp_avg": B}}}}, {"a": A}, ("left out, with its tensors: optimizer",)),
    "several beside": ({"state_dict": {"a": A}, "optimizer_states": [{"m": B}], "rng_state": [B], "ema_model": {"a": A}}, {"a": A}, ("left out, with its tensors: optimizer_states, rng_state, ema_model",)),
    "no tensors among them": ({"a": A, "step": 3, "note": "x"}, {"a": A}, ("left out, as it is no tensor: step, note",)),
    "a list": ({"model": {"a": [A, B]}}, {"a.0": A, "a.1": B}, ()),
    "nested without a known key": ({"encoder": {"a": A}, "decoder": {"b": B}}, {"encoder.a": A, "decoder.b": B}, ()),
    "an empty state_dict": ({"state_dict": {}, "model": {"a": A}}, {"a": A}, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_the_weights_are_found(tmp_path: Path, name: str) -> None:
    value, tensors, warnings = NESTED[name]
    path = saved(tmp_path / "x.pt", value)
    found = read_torch_file(path)
    same(path, found.header.entries, tensors)
    assert found.warnings == warnings


def test_a_key_that_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"model": {"a": A}, "ema": {"a": B}})
    same(path, read_torch_file(path, "model").header.entries, {"a": A})
    assert "holds no tensors under 'other'" in refusal(path, key="other")


UNCLEAR: dict[str, tuple[Any, str]] = {
    "two that could be": ({"state_dict": {"a": A}, "model": {"a": B}}, "holds tensors under 'state_dict' and under model (save the one that is meant alone)"),
    "a bare tensor beside": ({"model": {"a": A}, "mask": {"x": B}}, "holds tensors under 'model' and under mask"),
    "one tensor": (A, "holds one tensor without a name"),
    "a list": ([A], "holds no dict but a list"),
    "nothing": ({"epoch": 3}, "holds no tensors"),
    "an optimizer alone": ({"optimizer": {"m": A}}, "holds no tensors but optimizer"),
    "one name twice": ({"a": {"b": A}, "a.b": B}, "two tensors are called a.b"),
    "a name that is a path": ({"../a": A}, "tensor name '../a' is a path"),
    "a name with an escape": ({"a\x1b[2J": A}, "holds control characters"),
    "a name that is no text": ({(1, 2): A}, "a tensor lies under a key of kind tuple, which is no name"),
    "deep": ({"a": __import__("functools").reduce(lambda inner, _: [inner], range(80), A)}, "nested deeper than 64"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "a: is a sparse tensor, which is not read (save plain tensors)"),
    "quantised": (lambda: {"a": torch.quantize_per_tensor(A, 0.1, 0, torch.qint8)}, "storage of torch.QInt8Storage, which is not read"),
    "meta": ({"a": torch.empty(3, device="meta")}, "a: is a tensor without data (device meta)"),
    "expanded": ({"a": A[:1].expand(4, 2)}, "that repeats itself (strides [0, 1])"),
    "overlapping": ({"a": a_tensor("F32", (6,)).as_strided((4, 3), (1, 1))}, "overlaps itself"),
    "conjugate": ({"a": a_tensor("C64", (3,)).conj()}, "negated or conjugated"),
    "complex128": ({"a": torch.zeros(3, dtype=torch.complex128)}, "storage of torch.ComplexDoubleStorage, which is not read"),
    "a storage": ({"a": A, "s": torch.ones(3).untyped_storage()}, "s: is a storage without a shape"),
    "a module": (torch.nn.Linear(3, 2), "needs torch.nn.modules.linear.Linear, which is not read; nothing was executed"),
    "a namespace": ({"model": {"a": A}, "args": argparse.Namespace(x=1)}, "needs argparse.Namespace, which is not read"),
    "an array": ({"a": np.arange(3)}, "needs numpy"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_not_clear_is_refused(tmp_path: Path, name: str) -> None:
    value, message = UNCLEAR[name]
    value = value() if name == "quantised" else value  # warns, as torch is about to drop it
    assert message in refusal(saved(tmp_path / "x.pt", value))


def test_a_tree_with_records(tmp_path: Path) -> None:
    """Megatron's: a Namespace of arguments, arrays of a random state, nested dicts."""
    value = {
        "args": argparse.Namespace(hidden_size=48, dtype=torch.bfloat16),
        "checkpoint_version": 3.0,
        "model": {"language_model": {"encoder": {"a": A}}},
        "rng_state": [{"np_rng_state": np.random.default_rng(1).integers(0, 9, 5)}],
    }
    path = saved(tmp_path / "x.pt", value)
    found = read_torch_tree(path, inert=None)
    assert found.value["args"].state == {"hidden_size": 48, "dtype": Global("torch", "bfloat16")}
    assert found.value["checkpoint_version"] == 3.0
    entries, rest = tensors_under(found.value["model"], "x")
    same(path, entries, {"language_model.encoder.a": A})
    assert rest == []
    value.pop("rng_state")
    some = read_torch_file(saved(tmp_path / "y.pt", value), inert=[NAMESPACE])
    assert list(some.header.entries) == ["language_model.encoder.a"]
    assert isinstance(some.objects["args"], Call)


# ---------------------------------------------------------------------------------------------- other files, damage

FLOAT, BYTES = Global("torch", "FloatStorage"), Global("torch", "ByteStorage")


def rebuilt(first: object = 0, shape: object = (3, 2), strides: object = (2, 1), key: object = "0", numel: object = 12, kind: object = FLOAT, more: tuple[object, ...] = (False, Call(Global("collections", "OrderedDict"), ()))) -> Call:  # fmt: skip
    storage = Persistent(("storage", kind, key, "cpu", numel))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, first, shape, strides, *more))


def around(tensor: object) -> bytes:
    return torch_zip(pickled({"a": tensor}))


def local_name(raw: bytes) -> bytes:
    return raw.replace(b"x/data/0", b"x/data/1", 1)


GOOD = around(rebuilt())
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, which is no PyTorch file (it is truncated)"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0000000000000000000000\nsize 1\n", "is a Git LFS pointer, not the weights (run: git lfs pull)"),
    "gzip": (b"\x1f\x8b" + bytes(100), "is a gzip file"),
    "a plain pickle": (pickle.dumps({"a": np.arange(30)}, 2), "is a plain pickle, not a file of torch.save"),
    "an array": (b"\x93NUMPY" + bytes(100), "is a NumPy file"),
    "a page": (b"<!doctype html>" + b" " * 100, "is a web page"),
    "a tar": (bytes(257) + b"ustar" + bytes(300), "is a tar file"),
    "noise": (b"abcdefgh" * 20, "is not a PyTorch file"),
    "safetensors": (struct.pack("<Q", 2) + b"{}" + bytes(100), "is not a PyTorch file"),
    "truncated": (GOOD[:-30], "does not end as a zip file does"),
    "bytes after": (GOOD + b"more", "does not end as a zip file does"),
    "bytes before": (b"PK\x03\x04" + GOOD, "its zip directory ends at byte"),
    "no data.pkl": (zip_of({"x/version": b"3"}), "a zip file with no data.pkl"),
    "two data.pkl": (zip_of({"x/data.pkl": b"N.", "y/data.pkl": b"N."}), "2 members data.pkl"),
    "TorchScript": (torch_zip(pickled({}), **{"x/constants.pkl": b"N."}), "is a TorchScript program"),
    "TorchScript's code": (torch_zip(pickled({}), **{"x/code/__torch__.py": b""}), "is a TorchScript program"),
    "big-endian": (zip_of({"x/data.pkl": pickled({}), "x/byteorder": b"big"}), "not in little-endian byte order"),
    "compressed": (zip_of({"x/data.pkl": pickled({"a": "b" * 500})}, zipfile.ZIP_DEFLATED), "member 'x/data.pkl' is compressed"),
    "a member that is a path": (torch_zip(pickled({}), **{"x/../../y": b""}), "member name 'x/../../y' is a path"),
    "another name before the data": (local_name(GOOD), "member 'x/data/0' has another name, or none, where it begins"),
    "encrypted": (GOOD.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"), "is encrypted"),
    "sizes that differ": (GOOD.replace(struct.pack("<II", 48, 48) + b"\x08\x00\x00\x00x/data/0", struct.pack("<II", 47, 47) + b"\x08\x00\x00\x00x/data/0", 1), "is described otherwise"),
    "a storage that is not there": (around(rebuilt(key="7")), "wants the storage '7', which is not there"),
    "a storage elsewhere": (around(rebuilt(key="../data.pkl")), "wants the storage '../data.pkl', which is not there"),
    "a key that is a number": (around(rebuilt(key=0)), "a storage without a key"),
    "a storage larger than its member": (around(rebuilt(numel=13)), "a storage of 52 bytes in member data/0 of 48"),
    "a storage of a negative size": (around(rebuilt(numel=-1)), "whose size is no count"),
    "a storage of another class": (around(rebuilt(kind=NAMESPACE)), "needs argparse.Namespace"),
    "a storage that is a text": (around(rebuilt(kind="FloatStorage")), "a storage of no known kind"),
    "a tensor beyond its storage": (around(rebuilt(first=7)), "from element 7 of 4 bytes, its storage has 48 bytes"),
    "a negative offset": (around(rebuilt(first=-1)), "are no counts"),
    "negative strides": (around(rebuilt(strides=(-2, 1))), "are no counts"),
    "strides beyond": (around(rebuilt(strides=(2**40, 1))), "its storage has 48 bytes"),
    "a shape beyond any file": (around(rebuilt(shape=(2**60, 0))), "are no counts"),
    "a shape that is a bool": (around(rebuilt(shape=(True, 2))), "are no counts"),
    "a shape that is a list": (around(rebuilt(shape=[3, 2])), "do not fit each other"),
    "fewer strides": (around(rebuilt(strides=(1,))), "do not fit each other"),
    "70 dimensions": (around(rebuilt(shape=(1,) * 70, strides=(1,) * 70)), "70 dimensions"),
    "fewer arguments": (around(rebuilt(more=())), "rebuilds a tensor from 4 values"),
    "a tensor of no storage": (around(Call(Global("torch._utils", "_rebuild_tensor_v2"), (1, 0, (), (), False, None))), "what is no storage"),
    "a parameter of a text": (around(Call(Global("torch._utils", "_rebuild_parameter"), ("x", True, None))), "a parameter of what is no tensor"),
    "a dtype that is none": (around(Call(Global("torch._utils", "_rebuild_tensor_v3"), (Persistent(("storage", FLOAT, "0", "cpu", 6)), 0, (), (), False, None, "x"))), "a tensor of no dtype"),
    "an id of another kind": (torch_zip(pickled({"a": Persistent(("module", "x"))})), "a persistent id that is no storage's"),
    "code": (torch_zip(b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00mkdir canary\x85R."), "needs posix.system, which is not read; nothing was executed"),
    "a type in place of a function": (around(Call(Global("torch._tensor", "_rebuild_from_type_v2"), (Global("torch", "Tensor"), Global("torch", "Tensor"), (), None))), "a: is a tensor of a class of its own (torch.Tensor)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = FILES[name]
    (tmp_path / "x.pt").write_bytes(content)
    assert message in refusal(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_the_good_one_is_read(tmp_path: Path) -> None:
    """Else the refusals above might have other reasons; torch agrees."""
    (tmp_path / "x.pt").write_bytes(GOOD)
    same(
        tmp_path / "x.pt",
        read_torch_file(tmp_path / "x.pt").header.entries,
        torch.load(tmp_path / "x.pt", weights_only=True),
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_twice_and_members_in_members(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zip_of([("x/data.pkl", pickled({})), ("x/data.pkl", RUN)]))
    assert refusal(path) == "member 'x/data.pkl' is there twice"
    raw = bytearray(zip_of([("x/data.pkl", pickled({})), ("x/data/0", bytes(8)), ("x/data/1", bytes(8))]))
    with zipfile.ZipFile(path.with_suffix(".zip"), "w"):
        pass
    at = raw.rindex(b"PK\x01\x02")
    first = raw.index(b"PK\x03\x04", 4)
    raw[at + 42 : at + 46] = struct.pack("<I", first)
    path.write_bytes(raw)
    assert "lies in the one before it" in refusal(path)


RUN = b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00mkdir canary\x85R."


def test_a_tree_that_is_shared_without_end(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(b"\x80\x02}X\x01\x00\x00\x00aN" + b"2\x86" * 40 + b"s."))
    assert "or more than 2000000" in refusal(path)
    path.write_bytes(torch_zip(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."))
    assert "nested deeper than 64" in refusal(path)


def test_where_there_is_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.pt") == "is not there"
    (tmp_path / "y.pt").symlink_to("nowhere")
    assert refusal(tmp_path / "y.pt") == "is a link to a file that is not there (download it again)"
    assert refusal(tmp_path) == "is not a regular file"


OLD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda raw: raw[:-3], "ends after the file"),
    "truncated in a pickle": (lambda raw: raw[:300], "in the middle"),
    "bytes after": (lambda raw: raw + b"abc", "3 bytes follow the last storage"),
    "another protocol": (lambda raw: raw.replace(b"M\xe9\x03", b"M\xea\x03", 1), "another protocol than 1001"),
    "another size": (lambda raw: raw.replace(struct.pack("<Q", 30), struct.pack("<Q", 29)), "has another size where it lies"),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_damage_to_the_old_format(tmp_path: Path, name: str) -> None:
    damage, message = OLD[name]
    path = saved(tmp_path / "x.pt", {"a": a_tensor("F32", (5, 6))}, _use_new_zipfile_serialization=False)
    path.write_bytes(damage(path.read_bytes()))
    assert message in refusal(path)


def test_an_old_file_of_many_pickled_bytes(tmp_path: Path) -> None:
    tensors = {f"{number:05d}" + "n" * 900: a_tensor("U8", (number % 5,)) for number in range(1200)}
    path = saved(tmp_path / "x.pt", tensors, _use_new_zipfile_serialization=False)
    assert path.stat().st_size > 2**20
    same(path, read_torch_file(path).header.entries, tensors)


@pytest.mark.parametrize("old", [False, True])
@given(data=st.data())
@settings(max_examples=150)
def test_a_changed_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, old: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    raw = bytearray(
        saved(
            path, {"state_dict": {"a": A, "b": A[1:]}, "n": {"x": 1}}, _use_new_zipfile_serialization=not old
        ).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 3)) == 0:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path.write_bytes(raw)
    try:
        found: TorchFile | None = read_torch_file(path)
    except (InputError, StorageError) as error:
        found = None
        assert "\n" not in str(error)
    for entry in found.header.entries.values() if found else ():
        assert isinstance(entry, Entry)
        assert len(read_entry(bytes(raw), entry)) == entry.size
    shutil.rmtree(path.parent)


# ---------------------------------------------------------------------------------------------- folders


def folder_of(folder: Path, files: int = 1, **tiny: Any) -> dict[str, torch.Tensor]:
    """The tiny checkpoint as PyTorch's files, as Transformers wrote them."""
    folder.mkdir()
    tensors = {name: torch.from_numpy(held.array().copy()) for name, held in tiny_tensors(**tiny).items()}
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    names = (
        [f"pytorch_model-{n + 1:05d}-of-{files:05d}.bin" for n in range(files)] if files > 1 else ["pytorch_model.bin"]
    )
    place = {name: names[number % files] for number, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
    if files > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    torch.save({"x": A}, folder / "optimizer.pt")
    torch.save(argparse.Namespace(), folder / "training_args.bin")
    return tensors


@pytest.mark.parametrize("files", [1, 2])
def test_a_folder_is_cut_as_its_twin(tmp_path: Path, policy: str, files: int) -> None:
    """The twin is written by safetensors from what torch loads; merge gives the twin's own bytes."""
    folder_of(tmp_path / "pickled", files)
    (tmp_path / "twin").mkdir()
    shutil.copy(tmp_path / "pickled" / "config.json", tmp_path / "twin")
    weight_map = {}
    for path in sorted((tmp_path / "pickled").glob("pytorch_model*.bin")):
        name = path.with_suffix(".safetensors").name.removeprefix("pytorch_")
        state = torch.load(path, weights_only=True)
        weight_map |= dict.fromkeys(state, name)
        save_file(state, tmp_path / "twin" / name, {"format": "pt"})
    if files > 1:
        (tmp_path / "twin" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for kind in ("pickled", "twin"):
        api.split(tmp_path / kind, tmp_path / f"{kind}-shards", tp=3, policy=policy)
        api.merge(tmp_path / f"{kind}-shards", tmp_path / f"{kind}-merged")
    assert tree(tmp_path / "pickled-shards") == tree(tmp_path / "twin-shards")
    assert tree(tmp_path / "pickled-merged") == tree(tmp_path / "twin-merged")
    for name in set(weight_map.values()):
        assert (tmp_path / "pickled-merged" / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()


def test_safetensors_come_first(tmp_path: Path) -> None:
    folder_of(tmp_path / "m")
    write_checkpoint(tmp_path / "m", tiny_tensors())
    found = open_full(tmp_path / "m")
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert found.warnings == ("safetensors are there, so pytorch_model.bin is left out",)


def test_strided_and_tied_tensors_are_cut(tmp_path: Path) -> None:
    """Views in the file: a transposed matrix, and two names of one; the oracle is torch."""
    (tmp_path / "m").mkdir()
    base = a_tensor("F32", (60, 44))
    state = {
        "model.norm.weight": base[1],
        "lm_head.weight": a_tensor("F32", (44, 1003)).t(),
        "model.embed_tokens.weight": base,
    }
    torch.save({"state_dict": state, "optimizer": {"m": B}}, tmp_path / "m" / "best.ckpt")
    (tmp_path / "m" / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "tiny.yaml").write_text(POLICY)
    api.split(tmp_path / "m", tmp_path / "s", tp=4, policy=str(tmp_path / "tiny.yaml"))
    api.merge(tmp_path / "s", tmp_path / "merged")
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: bytes_of(held) for name, held in merged.items()} == {
        name: bytes_of(held) for name, held in state.items()
    }
    assert open_full(tmp_path / "m").warnings == ("best.ckpt: left out, with its tensors: optimizer",)
