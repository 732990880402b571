"""TensorFlow checkpoints without TensorFlow: files that it wrote (tests/data/make_tensorflow.py), against what it reads."""

from __future__ import annotations

import filecmp
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.proof import Arrays
from tpshard import api
from tpshard.checkpoint import open_full
from tpshard.containers import Kept, frame_file, read_frame
from tpshard.errors import InputError, TpshardError
from tpshard.header import Entry, Header
from tpshard.sources import SourceFiles
from tpshard.tensorflow_index import parse_index
from tpshard.verify.keras_model import KerasModel
from tpshard.verify.models import copy_with
from tpshard.verify.report import Verdict

DATA = Path(__file__).parent / "data" / "tensorflow"
VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"


def read(path: Path) -> Arrays:
    checkpoint = open_full(path)
    found = {}
    with SourceFiles(checkpoint) as files:
        for name, tensor in checkpoint.tensors.items():
            dtype = np.dtype({"F32": np.float32, "I64": np.int64}[tensor.dtype])
            data = np.empty(int(np.prod(tensor.shape)) * dtype.itemsize, np.uint8)
            files.read(tensor, 0, 0, data)
            found[name] = np.frombuffer(data.tobytes(), dtype).reshape(tensor.shape)
    return found


@pytest.fixture(scope="module")
def values() -> Arrays:
    with np.load(DATA / "values.npz") as file:
        return dict(file)


def of(values: Arrays, checkpoint: str) -> Arrays:
    begin = f"{checkpoint}:"
    return {key.removeprefix(begin).removesuffix(VARIABLE): v for key, v in values.items() if key.startswith(begin)}


def test_a_checkpoint_with_its_optimizer(values: Arrays) -> None:
    found, wanted = read(DATA / "ckpt"), of(values, "ckpt")
    assert len(found) == len(wanted)
    order = [
        "lstm.kernel",
        "lstm.recurrent_kernel",
        "lstm.bias",
        "lstm_1.kernel",
        "lstm_1.recurrent_kernel",
        "lstm_1.bias",
    ]
    for number, name in enumerate([*order, "dense.kernel", "dense.bias"]):
        np.testing.assert_array_equal(found[name], wanted[f"optimizer/_trainable_variables/{number}"])
        for slot, kind in enumerate(("momentum", "velocity")):
            there = wanted[f"optimizer/_variables/{2 + 2 * number + slot}"]
            np.testing.assert_array_equal(found[f"optimizer.{kind}.{name}"], there)
    np.testing.assert_array_equal(found["optimizer.iteration"], wanted["optimizer/_iterations"])
    np.testing.assert_array_equal(found["optimizer.learning_rate"], wanted["optimizer/_learning_rate"])
    assert found["save_counter"] == 1


@pytest.mark.parametrize("path", ["ckpt/ckpt-1", "ckpt/ckpt-1.index"])
def test_by_its_prefix_or_its_index(path: str) -> None:
    assert set(read(DATA / path)) == set(read(DATA / "ckpt"))
    assert open_full(DATA / path).carried == ("ckpt-1.index", "config.json")


def test_a_saved_model_has_every_weight_twice(values: Arrays) -> None:
    found, wanted = read(DATA / "saved"), of(values, "saved")
    assert len(found) == len(wanted)
    for number, name in ((0, "lstm.kernel"), (1, "lstm.recurrent_kernel"), (9, "dense.bias")):
        np.testing.assert_array_equal(found[name], wanted[f"variables/{number}"])
        np.testing.assert_array_equal(found[f"copy.{name}"], found[name])
    assert sorted(open_full(DATA / "saved").carried) == [
        "fingerprint.pb",
        "saved_model.pb",
        "variables/variables.index",
    ]


@pytest.mark.parametrize("kind", ["ckpt", "saved"])
def test_split_verify_merge(kind: str, tmp_path: Path) -> None:
    """A SavedModel with Keras' own configuration beside it is known as a model; it comes back byte for byte."""
    shutil.copytree(DATA / kind, tmp_path / "source")
    shutil.copy(DATA / "ckpt" / "config.json", tmp_path / "source" / "config.json")
    api.split(tmp_path / "source", tmp_path / "shards", tp=4)
    tensors = api.inspect(tmp_path / "shards").tensors
    twin = "optimizer.velocity.lstm.kernel" if kind == "ckpt" else "copy.lstm.kernel"
    assert tensors[twin].layout == tensors["lstm.kernel"].layout
    assert tensors["lstm.kernel"].layout.cut_axes == (1,)
    report = api.verify(tmp_path / "shards", against=tmp_path / "source")
    assert report.verdict is Verdict.PASS
    api.merge(tmp_path / "shards", tmp_path / "merged")
    there = {path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    here = {path.relative_to(tmp_path / "source") for path in (tmp_path / "source").rglob("*") if path.is_file()}
    assert there == here
    assert all(filecmp.cmp(tmp_path / "source" / name, tmp_path / "merged" / name, shallow=False) for name in here)


def test_without_a_configuration_a_policy_is_needed(tmp_path: Path) -> None:
    with pytest.raises(TpshardError, match="no config.json"):
        api.split(DATA / "saved", tmp_path / "shards", tp=2)
    rules = "lstm: {rule: column, dims: io, parts: 4, gather: true}"
    (tmp_path / "p.yaml").write_text(f"name: mine\ndefault: replicate\nrules: {{{rules.replace(': {', ': {', 1)}}}\n")
    api.split(DATA / "saved", tmp_path / "shards", tp=2, policy=str(tmp_path / "p.yaml"))
    assert api.inspect(tmp_path / "shards").tensors["lstm.bias"].layout.cut_axes == (0,)


def test_the_module_computes_what_tensorflow_computed(values: Arrays) -> None:
    config, weights = open_full(DATA / "ckpt").config, read(DATA / "ckpt")
    made = KerasModel(config, {name: array.shape for name, array in weights.items()}, torch.float32)
    tensors = {
        name: recipe.make(lambda tensor: torch.from_numpy(weights[tensor].copy()))
        for name, recipe in made.recipes.items()
    }
    module = copy_with(made.skeleton, tensors, torch.device("cpu"))
    with torch.no_grad():
        got = module(torch.from_numpy(values["x"]))
    np.testing.assert_allclose(got.numpy(), values["y"], atol=1e-5)


# ---------------------------------------------------------------------------------------------- what is refused


def test_partitioned_variables_are_refused() -> None:
    with pytest.raises(InputError, match="split: is a partitioned variable"):
        open_full(DATA / "slices")


def copied(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "ckpt", tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_a_data_file_that_is_gone_or_short(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (data,) = folder.glob("*.data-*")
    data.write_bytes(data.read_bytes()[:9000])
    with pytest.raises(InputError, match="truncated"):
        open_full(folder)
    data.unlink()
    with pytest.raises(InputError, match=r"data-00000-of-00001: is not there"):
        open_full(folder / "ckpt-1.index")


def test_every_byte_of_the_index_may_be_wrong(tmp_path: Path) -> None:
    """Whatever is damaged, it is read otherwise or refused in one line; never another error, nor more memory."""
    folder = copied(tmp_path)
    raw = (folder / "ckpt-1.index").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for place in random.choice(len(raw), 300, replace=False):
        bad = bytearray(raw)
        bad[place] ^= int(random.integers(1, 256))
        (folder / "ckpt-1.index").write_bytes(bad)
        try:
            open_full(folder / "ckpt-1.index")
        except TpshardError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


@pytest.mark.parametrize("raw", [b"", bytes(48), b"x" * 40 + struct.pack("<Q", 0xDB4775248B80FB57)])
def test_no_index_at_all(raw: bytes) -> None:
    with pytest.raises(InputError, match=r"ckpt\.index: is not a TensorFlow index"):
        parse_index(raw, "ckpt.index")


def test_a_file_that_is_all_tensors_has_nothing_around_them(tmp_path: Path) -> None:
    (tmp_path / "x.data").write_bytes(bytes(12))
    header = Header({"a": Entry("F32", (3,), 0, 12)}, {}, 0, 12)
    (tmp_path / "x.frame").write_bytes(frame_file(tmp_path / "x.data", header))
    assert read_frame(tmp_path / "x.frame") == Kept(12, {"a": 0}, ())
