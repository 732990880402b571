"""Keras checkpoints in and out: what Keras itself saves, loads and computes is what is compared with."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.keras_models import MODELS, keras, layers, randomised, two_lstms
from tests.proof import Arrays
from tests.tampering import Folder
from tpshard import api
from tpshard.checkpoint import open_full
from tpshard.containers import checked, frame_file, read_frame
from tpshard.errors import InputError, PolicyError, UsageError
from tpshard.header import Entry
from tpshard.keras_policy import keras_policy
from tpshard.sources import SourceFiles
from tpshard.verify.keras_model import KerasModel
from tpshard.verify.models import copy_with
from tpshard.verify.preparation import default_dtype
from tpshard.verify.report import CheckResult, Verdict

h5py: Any = pytest.importorskip("h5py")

# Keras 3 itself, on torch with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NUMPY = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64, "BF16": np.dtype("V2")}


def read(path: Path) -> Arrays:
    """All tensors of a checkpoint, as numbers, by their names here."""
    checkpoint = open_full(path)
    found = {}
    with SourceFiles(checkpoint) as files:
        for name, tensor in checkpoint.tensors.items():
            dtype = np.dtype(NUMPY[tensor.dtype])
            data = np.empty(int(np.prod(tensor.shape)) * dtype.itemsize, np.uint8)
            files.read(tensor, 0, 0, data)
            found[name] = np.frombuffer(data.tobytes(), dtype).reshape(tensor.shape)
    return found


def variables(model: Any) -> Arrays:
    """A model's variables by Keras' own paths, in the words used here."""
    found = {}
    for variable in model.variables:
        if "seed_generator" not in variable.path:
            path = variable.path.split("/")
            path = path[1:] if path[0] == model.name else path
            kept = [part for place, part in enumerate(path) if place == 0 or not part.endswith("_cell")]
            found[".".join(kept)] = np.asarray(keras.ops.convert_to_numpy(variable.value))
    return found


def check(report: Any, name: str) -> CheckResult:
    return next(result for result in report.checks if result.name == name)


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    model = MODELS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    model.save(folder / "m.keras")
    return request.param, model, folder


# ---------------------------------------------------------------------------------------------- reading


def test_every_variable_by_its_name(saved: tuple[str, Any, Path]) -> None:
    _, model, folder = saved
    found, wanted = read(folder / "m.keras"), variables(model)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["m.weights.h5", "m.h5", "m.weights.json"])
def test_other_files_have_the_same_names(saved: tuple[str, Any, Path], name: str, tmp_path: Path) -> None:
    _, model, _ = saved
    if name == "m.h5":
        model.save(tmp_path / name)
    elif name == "m.weights.json":
        largest = max(array.nbytes for array in variables(model).values())
        model.save_weights(tmp_path / name, max_shard_size=1.05 * largest / 1024**3)
    else:
        model.save_weights(tmp_path / name)
    if name != "m.h5":
        (tmp_path / "config.json").write_text(model.to_json())
    if name == "m.weights.json":
        assert len(list(tmp_path.glob("*.h5"))) > 1
    found, wanted = read(tmp_path), variables(model)
    assert {name: array.tobytes() for name, array in found.items() if not name.startswith("optimizer")} == {
        name: array.tobytes() for name, array in wanted.items()
    }


def test_weights_without_a_configuration_are_named_by_what_they_look_like(tmp_path: Path) -> None:
    model = two_lstms(16, 20)
    model.save_weights(tmp_path / "m.weights.h5")
    assert {name: a.tobytes() for name, a in read(tmp_path).items()} == {
        name: a.tobytes() for name, a in variables(model).items()
    }
    with pytest.raises(PolicyError, match="no config.json"):
        api.split(tmp_path, tmp_path.parent / "out", tp=2)


@pytest.mark.parametrize("key", MODELS)
def test_old_files_do_not_name_their_layers(key: str, tmp_path: Path) -> None:
    """Before the name attribute came into Keras, only the configuration told."""
    model = MODELS[key]()
    model.save_weights(tmp_path / "m.weights.h5")
    (tmp_path / "config.json").write_text(model.to_json())
    with h5py.File(tmp_path / "m.weights.h5", "r+") as file:
        file.visititems(lambda key, item: item.attrs.clear())
    found, wanted = read(tmp_path), variables(model)
    assert {name: a.tobytes() for name, a in found.items()} == {name: a.tobytes() for name, a in wanted.items()}


def test_files_of_keras_2(tmp_path: Path) -> None:
    """Written by hand as Keras 2 wrote weights: no group around the layers, names that end in :0, bytes for texts."""
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = [b"lstm_7", b"out"]
        for layer, names in ((b"lstm_7", [b"lstm_7/lstm_cell_3/kernel:0"]), (b"out", [b"out/kernel:0", b"out/bias:0"])):
            group = file.create_group(layer)
            group.attrs["weight_names"] = names
            for number, name in enumerate(names):
                group.create_dataset(name, data=np.full((3, 8)[: 2 - number], len(name), np.float32))
    assert {name: array.shape for name, array in read(tmp_path).items()} == {
        "lstm_7.kernel": (3, 8), "out.kernel": (3, 8), "out.bias": (3,),
    }  # fmt: skip


def test_optimizer_goes_with_its_variables(tmp_path: Path) -> None:
    model = two_lstms(8, 5)
    model.compile("adam", "mse")
    model.fit(np.ones((2, 3, 5)), np.ones((2, 1)), verbose=0)
    model.save(tmp_path / "m.keras")
    api.split(tmp_path / "m.keras", tmp_path / "shards", tp=2)
    tensors = api.inspect(tmp_path / "shards").tensors
    kernel = tensors["lstm.kernel"].layout
    assert kernel.cut_axes == (1,)
    assert [tensors[f"optimizer.slot_{slot}.lstm.kernel"].layout for slot in (0, 1)] == [kernel, kernel]
    assert tensors["optimizer.0"].layout.is_replicated
    velocity = next(v for v in model.optimizer.variables if v.path.endswith("lstm_1_lstm_cell_bias_velocity"))
    np.testing.assert_array_equal(
        read(tmp_path / "m.keras")["optimizer.slot_1.lstm_1.bias"], keras.ops.convert_to_numpy(velocity.value)
    )


def test_bfloat16(tmp_path: Path) -> None:
    x = [keras.Input((6,), dtype="bfloat16"), layers.Dense(5, dtype="bfloat16", name="dense")]
    model = randomised(keras.Sequential(x))
    for name in ("m.keras", "m.h5"):
        model.save(tmp_path / name)
        tensor = open_full(tmp_path / name).tensors["dense.kernel"]
        assert (tensor.dtype, tensor.shape) == ("BF16", (6, 5))
        kernel = read(tmp_path / name)["dense.kernel"]
        wanted = model.layers[0].kernel.value.detach().view(torch.int16).numpy()
        np.testing.assert_array_equal(kernel.view(np.int16), wanted)


# ---------------------------------------------------------------------------------------------- what is refused


def broken(tmp_path: Path, change: Callable[[Any], None]) -> Path:
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        group = file.create_group("layers/dense/vars")
        group.attrs["name"] = "dense"
        change(group)
    return tmp_path / "m.weights.h5"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g.create_dataset("0", data=np.ones((4, 3)), chunks=(2, 3)), "in chunks or compressed"),
        (lambda g: g.create_dataset("0", data=np.ones((4, 3)), compression="gzip"), "in chunks or compressed"),
        (lambda g: g.create_dataset("0", (4, 3), np.float32), "have no place in the file"),
        (lambda g: g.create_dataset("0", data=np.ones((4, 3)), external=[("x", 0, 96)]), "in another file"),
        (lambda g: g.create_dataset("0", data=np.ones((4, 3), ">f4")), "dtype >f4"),
        (lambda g: g.create_dataset("0", data=np.ones((4, 3), np.complex64)), "dtype <c8"),
        (lambda g: g.create_group("0"), "holds no tensors"),
    ],
)
def test_other_kinds_of_storage_are_refused(
    tmp_path: Path, change: Callable[[Any], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        open_full(broken(tmp_path, change))


def damaged(raw: bytes) -> Iterator[tuple[str, bytes]]:
    yield "cut off", raw[: len(raw) // 2]
    yield "no zip", b"PK\x03\x04" + bytes(500)
    yield "empty", b""
    start = raw.index(b"\x89HDF")
    yield "no HDF5", raw[:start] + bytes(64) + raw[start + 64 :]
    yield "heaps", raw.replace(b"HEAP", b"PAEH")
    yield "trees", raw.replace(b"TREE", b"EERT")


def test_damaged_files(tmp_path: Path) -> None:
    two_lstms(8, 5).save(tmp_path / "m.keras")
    for what, raw in damaged((tmp_path / "m.keras").read_bytes()):
        (tmp_path / "bad.keras").write_bytes(raw)
        with pytest.raises(InputError) as caught:
            open_full(tmp_path / "bad.keras")
        assert "\n" not in str(caught.value), what


def test_a_deflated_member_and_a_missing_one(tmp_path: Path) -> None:
    two_lstms(8, 5).save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as there, zipfile.ZipFile(tmp_path / "z.keras", "w") as here:
        for name in there.namelist():
            here.writestr(name, there.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="deflated"):
        open_full(tmp_path / "z.keras")
    with zipfile.ZipFile(tmp_path / "n.keras", "w") as here:
        here.writestr("config.json", "{}")
    with pytest.raises(InputError, match=r"holds no model\.weights\.h5"):
        open_full(tmp_path / "n.keras")


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_lstms(8, 5).save(tmp_path / "m.keras")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UsageError, match=r"tpshard\[keras\]"):
        open_full(tmp_path / "m.keras")


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    two_lstms(8, 5).save(tmp_path / "two" / "a.keras")
    shutil.copy(tmp_path / "two" / "a.keras", tmp_path / "two" / "b.keras")
    with pytest.raises(InputError, match=r"holds 2 checkpoints: a\.keras, b\.keras"):
        open_full(tmp_path / "two")
    assert open_full(tmp_path / "two" / "a.keras").carried == ()
    (tmp_path / "two" / "b.keras").unlink()
    (tmp_path / "two" / "notes.txt").write_text("words")
    assert open_full(tmp_path / "two").carried == ("notes.txt",)


def test_tensors_must_not_overlap_or_leave_the_file() -> None:
    one, two = Entry("U8", (4,), 2, 4), Entry("U8", (4,), 5, 4)
    with pytest.raises(InputError, match="b begins at 5, inside a"):
        checked(Path("f"), 20, {"a": one, "b": two}, {})
    with pytest.raises(InputError, match="ends at byte 9, the file has 8"):
        checked(Path("f"), 8, {"b": two}, {})


def test_frames(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    header = checked(tmp_path / "f", 10, {"b": Entry("U8", (2,), 6, 2), "a": Entry("U8", (3,), 2, 3)}, {})
    raw = frame_file(tmp_path / "f", header)
    (tmp_path / "f.frame").write_bytes(raw)
    assert read_frame(tmp_path / "f.frame").fixed == ((0, b"01"), (5, b"5"), (8, b"89"))
    for bad in (b"", raw[:20], raw[:-3], bytes(8) + raw[8:], raw.replace(b'"size":10', b'"size":09')):
        (tmp_path / "f.frame").write_bytes(bad)
        with pytest.raises(InputError):
            read_frame(tmp_path / "f.frame")


# ---------------------------------------------------------------------------------------------- round trips


def test_split_verify_merge(saved: tuple[str, Any, Path], tmp_path: Path) -> None:
    """Every kind of layer: cut, proven by running it forward and backward, and given back byte for byte."""
    key, model, folder = saved
    tp = {"two-lstms": 4, "sentences": 4}.get(key, 2)
    api.split(folder / "m.keras", tmp_path / "shards", tp=tp)
    assert any(tensor.layout.cut_axes for tensor in api.inspect(tmp_path / "shards").tensors.values())
    report = api.verify(tmp_path / "shards", against=folder / "m.keras")
    assert report.verdict is Verdict.PASS, [(r.name, r.unproven, r.findings[:2]) for r in report.checks]
    for name in ("forward", "backward", "generic", "self-test"):
        assert check(report, name).verdict is Verdict.PASS, (key, name)
    api.merge(tmp_path / "shards", tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["m.keras"]
    assert (tmp_path / "merged" / "m.keras").read_bytes() == (folder / "m.keras").read_bytes()
    again = keras.saving.load_model(tmp_path / "merged" / "m.keras")
    assert all(map(np.array_equal, again.get_weights(), model.get_weights()))


def test_the_example_by_hand(tmp_path: Path) -> None:
    """Rank 2 of 4 has units 64 to 95 of each gate, and the dense layer's rows of them."""
    model = two_lstms()
    model.save(tmp_path / "m.keras")
    api.split(tmp_path / "m.keras", tmp_path / "shards", tp=4)
    (file,) = (tmp_path / "shards").glob("rank-00002*")
    from safetensors.numpy import load_file

    mine, whole = load_file(file), variables(model)
    columns = np.concatenate([np.arange(64, 96) + 128 * gate for gate in range(4)])
    for name in ("lstm.kernel", "lstm.recurrent_kernel", "lstm_1.kernel", "lstm_1.recurrent_kernel", "lstm_1.bias"):
        np.testing.assert_array_equal(mine[name], whole[name][..., columns], err_msg=name)
    np.testing.assert_array_equal(mine["dense.kernel"], whole["dense.kernel"][64:96])
    assert mine["lstm.recurrent_kernel"].shape == (128, 128)


def test_reshard_and_safetensors(tmp_path: Path) -> None:
    two_lstms(16, 5).save(tmp_path / "m.keras")
    api.split(tmp_path / "m.keras", tmp_path / "two", tp=2)
    api.reshard(tmp_path / "two", tmp_path / "four", tp=4)
    api.merge(tmp_path / "four", tmp_path / "merged")
    assert (tmp_path / "merged" / "m.keras").read_bytes() == (tmp_path / "m.keras").read_bytes()
    api.merge(tmp_path / "four", tmp_path / "plain", max_shard_size=10**9)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]
    api.split(tmp_path / "plain", tmp_path / "again", tp=2)
    assert api.inspect(tmp_path / "again").tensors["lstm.kernel"].layout.cut_axes == (1,)


def test_a_frame_that_is_gone_or_changed(tmp_path: Path) -> None:
    two_lstms(8, 5).save(tmp_path / "m.keras")
    api.split(tmp_path / "m.keras", tmp_path / "shards", tp=2)
    frame = tmp_path / "shards" / "m.keras.frame"
    raw = frame.read_bytes()
    frame.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert api.verify(tmp_path / "shards", level="files").verdict is Verdict.FAIL
    with pytest.raises(InputError, match=r"m\.keras\.frame"):
        api.merge(tmp_path / "shards", tmp_path / "merged")
    start = raw.index(b'"lstm.bias":') + len(b'"lstm.bias":')
    frame.write_bytes(raw[:start] + (b"1" if raw[start : start + 1] != b"1" else b"2") + raw[start + 1 :])
    with pytest.raises(InputError, match=r"m\.keras\.frame: was changed"):
        api.merge(tmp_path / "shards", tmp_path / "merged")
    frame.unlink()
    with pytest.raises(InputError, match=r"m\.keras\.frame: is not there"):
        api.merge(tmp_path / "shards", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------------------------------------- what it computes


@pytest.fixture
def in_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Keras computing in a dtype. Its products of float64 are float32 unless it is told otherwise."""
    from keras.src.backend.common import dtypes

    usual = dtypes.result_type

    def result(*given: Any) -> str:
        return "float64" if any("float64" in str(dtype) for dtype in given) else usual(*given)

    was = keras.config.floatx()
    monkeypatch.setattr(dtypes, "result_type", result)
    monkeypatch.setattr("keras.src.backend.result_type", result)
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(was)
    keras.config.set_dtype_policy(was)


@pytest.mark.parametrize("in_dtype", ["float32", "float64"], indirect=True)
@pytest.mark.parametrize("key", MODELS)
def test_the_module_computes_what_keras_computes(key: str, in_dtype: str) -> None:
    model, dtype = MODELS[key](), getattr(torch, in_dtype)
    config = {"model_type": f"keras_{type(model).__name__.lower()}", **json.loads(model.to_json())}
    weights = {name: torch.from_numpy(array.copy()) for name, array in variables(model).items()}
    with default_dtype(dtype):
        made = KerasModel(config, {name: tuple(t.shape) for name, t in weights.items()}, dtype)
        tensors = {name: recipe.make(weights.__getitem__) for name, recipe in made.recipes.items()}
        module = copy_with(made.skeleton, tensors, torch.device("cpu"))
        (given,) = made.inputs(2, 0)[""]
        with torch.no_grad():
            got = module(given).numpy()
    want = model.predict(given.numpy(), verbose=0)
    assert got.dtype == want.dtype == in_dtype
    np.testing.assert_allclose(got, want, atol=1e-5 if in_dtype == "float32" else 1e-10, rtol=0)
    assert np.abs(want).max() > 1e-2


def inconclusive(model: Any, tmp_path: Path, **options: Any) -> str:
    model.save(tmp_path / "m.keras")
    api.split(tmp_path / "m.keras", tmp_path / "shards", tp=2, **options)
    report = api.verify(tmp_path / "shards", against=tmp_path / "m.keras")
    assert report.verdict is Verdict.INCONCLUSIVE
    return check(report, "forward").unproven or ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([layers.LSTM(8, activation="relu")], "activation=relu"),
        ([layers.GRU(8, reset_after=False)], "reset_after=False"),
        ([layers.Conv1DTranspose(6, 3)], "Conv1DTranspose"),
        ([layers.RNN(layers.LSTMCell(6))], "RNN"),
        ([layers.LayerNormalization(axis=1)], "over axis"),
        ([layers.Masking(), layers.LSTM(8)], "Masking"),
    ],
)
def test_what_is_not_known_is_inconclusive(more: list[Any], said: str, tmp_path: Path) -> None:
    stack = [keras.Input((7, 5)), *(type(layer).from_config(layer.get_config()) for layer in more), layers.Dense(66)]
    assert said in inconclusive(randomised(keras.Sequential(stack)), tmp_path)


# ---------------------------------------------------------------------------------------------- faults


def shards_by(rules: str, model: Any, tmp_path: Path) -> Any:
    model.save(tmp_path / "m.keras")
    policy = tmp_path / "p.yaml"
    policy.write_text(f"name: wrong\ndefault: replicate\nrules:\n{rules}")
    api.split(tmp_path / "m.keras", tmp_path / "shards", tp=2, policy=str(policy))
    return api.verify(tmp_path / "shards", against=tmp_path / "m.keras")


def test_a_contiguous_cut_of_the_gates_fails(tmp_path: Path) -> None:
    """It merges back bit for bit, and only running it shows that rank 0 has two gates and no cell."""
    rules = "  lstm: {rule: column, dims: io, gather: true}\n  lstm_1: {rule: column, dims: io, parts: 4}\n  dense: {rule: row, dims: io}\n"
    report = shards_by(rules, two_lstms(8, 5), tmp_path)
    assert check(report, "weights").verdict is Verdict.PASS
    assert report.verdict is Verdict.FAIL
    assert check(report, "forward").findings


def test_a_gru_cut_as_an_lstm_fails(tmp_path: Path) -> None:
    stack = [keras.Input((7, 5)), layers.GRU(8, name="gru"), layers.Dense(3, name="dense")]
    report = shards_by("  gru: {rule: column, dims: io, parts: 4}\n  dense: {rule: row, dims: io}\n",
                       randomised(keras.Sequential(stack)), tmp_path)  # fmt: skip
    assert report.verdict is Verdict.FAIL
    assert check(report, "forward").findings


def test_exchanged_gates_fail(tmp_path: Path) -> None:
    two_lstms(8, 5).save(tmp_path / "m.keras")
    api.split(tmp_path / "m.keras", tmp_path / "shards", tp=2)
    folder = Folder(tmp_path / "shards")
    order = np.r_[4:8, 0:4, 8:16]  # of rank 1's four units: f, i, c, o
    for name in ("lstm.kernel", "lstm.recurrent_kernel", "lstm.bias"):
        folder.rearrange(name, 1, lambda array: array[..., order])
    folder.reseal()
    report = api.verify(tmp_path / "shards", against=tmp_path / "m.keras")
    assert report.verdict is Verdict.FAIL
    assert check(report, "weights").findings
    assert check(report, "forward").findings


def test_a_row_without_its_column_fails(tmp_path: Path) -> None:
    """A softmax between them would be of each rank's own features."""
    first = layers.Dense(8, activation="softmax", name="first")
    model = randomised(keras.Sequential([keras.Input((5,)), first, layers.Dense(6, name="second")]))
    rules = "  first: {rule: column, dims: io}\n  second: {rule: row, dims: io}\n"
    report = shards_by(rules, model, tmp_path)
    assert report.verdict is Verdict.FAIL


# ---------------------------------------------------------------------------------------------- policies


def rules_of(model: Any) -> dict[str, Any]:
    return {
        key: rule for document in keras_policy(json.loads(model.to_json())) for key, rule in document["rules"].items()
    }


def test_pairs_are_found_where_they_are_right() -> None:
    assert rules_of(MODELS["signals"]()) == {
        "wide": {"rule": "column", "dims": ".io"},
        "narrow": {"rule": "row", "dims": ".io"},
        "each.inner": {"rule": "column", "dims": "io", "gather": True},
        "up": {"rule": "column", "dims": "io"},
        "down": {"rule": "row", "dims": "io"},
    }


def test_a_layer_that_two_take_or_that_is_called_twice_is_no_pair() -> None:
    first = keras.Input((5,))
    shared = layers.Dense(66, name="shared")
    x = layers.Dense(70, name="taken")(first)
    outputs = [layers.Dense(3, name="one")(x), layers.Dense(4, name="two")(x)]
    twice = layers.Dense(7, name="after")(layers.Add(name="sum")([shared(first), shared(first)]))
    rules = rules_of(keras.Model(first, [*outputs, twice]))
    gathered = {"rule": "column", "dims": "io", "gather": True}
    assert rules == {"taken": gathered, "shared": gathered}


def test_softmax_is_not_between_a_pair() -> None:
    stack = [keras.Input((5,)), layers.Dense(70, activation="softmax", name="a"), layers.Dense(6, name="b")]
    assert rules_of(keras.Sequential(stack)) == {"a": {"rule": "column", "dims": "io", "gather": True}}


@pytest.mark.parametrize("config", [{"layers": [3]}, {"layers": [{"class_name": "Bidirectional", "config": {"name": "x"}}]},
                                    {"layers": [{"class_name": "Dense", "config": {}}]}])  # fmt: skip
def test_malformed_configurations(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="malformed"):
        keras_policy({"class_name": "Sequential", "config": config})
