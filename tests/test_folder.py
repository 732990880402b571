"""What a checkpoint folder holds: weight files, index, config.json, and what goes along."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.build import Tensor, config, save, tensor, tiny_checkpoint, write_checkpoint
from tpshard import folder as folder_module
from tpshard.checkpoint import open_checkpoint, open_full
from tpshard.errors import InputError, StorageError, TpshardError
from tpshard.folder import carried_files, find_weights, is_bare_name, natural_order, read_config, read_json
from tpshard.quantised import read_quantised

ONE = {"a": tensor("F32", (3,))}
INDEX = "model.safetensors.index.json"


def write(folder: Path, name: str, content: bytes | str | object) -> None:
    """A file of bytes, of text, or of JSON."""
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def index(folder: Path, weight_map: object, **more: Any) -> None:
    write(folder, INDEX, {"weight_map": weight_map, **more})


def refusal(folder: Path, kind: type[TpshardError] = InputError) -> str:
    """The message about a checkpoint, without its folder."""
    with pytest.raises(kind) as caught:
        open_full(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message.removeprefix(str(folder)).lstrip("/: ")


# ---------------------------------------------------------------------------------------------- which files


def test_one_file(tmp_path: Path) -> None:
    save(tmp_path / "weights.safetensors", ONE)
    assert find_weights(tmp_path).names == ("weights.safetensors",)


def test_files_and_index(tmp_path: Path) -> None:
    tensors = {f"t{n}": tensor("F32", (n + 1,), n) for n in range(12)}
    write_checkpoint(tmp_path, tensors, files=11)
    found = open_full(tmp_path)
    assert [file.name for file in found.files] == [f"model-{n:05d}-of-00011.safetensors" for n in range(1, 12)]
    assert set(found.tensors) == set(tensors)
    assert not found.warnings


def test_files_are_taken_in_natural_order(tmp_path: Path) -> None:
    for n in (1, 2, 10):
        save(tmp_path / f"part-{n}.safetensors", {f"t{n}": tensor("U8", (n,))})
    index(tmp_path, {f"t{n}": f"part-{n}.safetensors" for n in (10, 2, 1)})
    assert find_weights(tmp_path).names == ("part-1.safetensors", "part-2.safetensors", "part-10.safetensors")
    assert sorted(["r10", "r9", "r100", "q", "10"], key=natural_order) == ["10", "q", "r9", "r10", "r100"]


def test_a_file_that_the_index_does_not_name_is_told_and_left_out(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "m", files=3)
    save(tmp_path / "m" / "stale.safetensors", {"model.norm.weight": tensor("F32", (44,), 9)})
    found = open_full(tmp_path / "m")
    assert len(found.files) == 3
    assert found.warnings == (f"{INDEX} does not name stale.safetensors: left out",)


@pytest.mark.parametrize("total", [7, 0, 1e12])
def test_a_total_size_that_is_wrong_is_told(tmp_path: Path, total: float) -> None:
    save(tmp_path / "model.safetensors", ONE)
    index(tmp_path, {"a": "model.safetensors"}, metadata={"total_size": total})
    assert open_full(tmp_path).warnings == (f"the index says {total} bytes of tensors (total_size), there are 12",)


@pytest.mark.parametrize("metadata", [{"total_size": 12}, {"total_size": 12.0}, {}, None, [], "x"])
def test_a_total_size_that_is_right_or_absent(tmp_path: Path, metadata: object) -> None:
    save(tmp_path / "model.safetensors", ONE)
    index(tmp_path, {"a": "model.safetensors"}, metadata=metadata)
    assert open_full(tmp_path).warnings == ()


def test_links_of_the_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save(tmp_path / "blobs" / "0f3e", ONE)
    write(tmp_path / "blobs", "11aa", {"model_type": "x"})
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0f3e")
    (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/11aa")
    found = open_full(tmp_path / "snapshot")
    assert (list(found.tensors), found.config, found.carried) == (["a"], {"model_type": "x"}, ("config.json",))


# ---------------------------------------------------------------------------------------------- no checkpoint


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no safetensors file"),
        (["config.json", "README.md"], "holds no safetensors file"),
        (["pytorch_model.bin"], "pytorch_model.bin: has 2 bytes, which is no PyTorch file (it is truncated)"),
        (["model.ckpt", "config.json"], "model.ckpt: has 2 bytes"),
        (["a.pt", "b.pth"], "has 2 PyTorch files (a.pt, b.pth) and no index (keep the one that is meant, or add pytorch_model.bin.index.json)"),
        (["training_args.bin", "rng_state_0.pth"], "holds PyTorch files (rng_state_0.pth), but none with weights (weights are in model.safetensors, pytorch_model.bin or one"),
        (["optimizer.pt", "scheduler.pt"], "holds PyTorch files (optimizer.pt)"),
        (["adapter_model.safetensors", "adapter_config.json"], "holds an adapter (adapter_config.json), not a model (tpshard split takes it with --base MODEL)"),
        (["adapter_model.safetensors"], "holds an adapter (adapter_model.safetensors)"),
        (["model.safetensors.incomplete"], "model.safetensors.incomplete is an unfinished download or compressed (finish it first)"),
        (["model.safetensors.gz"], "model.safetensors.gz is an unfinished download or compressed"),
        (["a.safetensors", "b.safetensors"], "has 2 safetensors files and no index (model.safetensors.index.json is missing)"),
        ([INDEX, "other.safetensors.index.json"], f"has 2 indexes: {INDEX}, other.safetensors.index.json (keep the one that is meant)"),
    ],
)  # fmt: skip
def test_folders_that_are_no_checkpoint(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        save(tmp_path / name, ONE) if name.endswith(".safetensors") else write(tmp_path, name, {})
    assert refusal(tmp_path).startswith(message)


def test_an_adapter_beside_a_model_is_not_read(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", ONE)
    save(tmp_path / "adapter_model.safetensors", {"b": tensor("F32", (2,))})
    assert list(open_full(tmp_path).tensors) == ["a"]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == "is not there"
    save(tmp_path / "model.safetensors", ONE)
    assert refusal(tmp_path / "model.safetensors") == "is a file (give the checkpoint's folder)"
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in refusal(tmp_path / "loop", StorageError)


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert refusal(tmp_path, StorageError) == "Permission denied"


def test_files_without_tensors(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {})
    assert refusal(tmp_path) == "holds no tensors"


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling"])
def test_a_weight_file_that_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "dangling": lambda: path.symlink_to("blob")}[kind]()
    expected = "is a link to a file that is not there" if kind == "dangling" else "is not a regular file"
    assert refusal(tmp_path).startswith(f"model.safetensors: {expected}")


# ---------------------------------------------------------------------------------------------- the index

FILE = "model.safetensors"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"{INDEX}: is not JSON: Expecting value at line 1, column 1"),
        (b"\xff", f"{INDEX}: is not UTF-8 (byte 0)"),
        ([], f"{INDEX}: is a JSON list, not an object"),
        ({}, f"{INDEX}: weight_map is missing or empty"),
        ({"weight_map": {}}, f"{INDEX}: weight_map is missing or empty"),
        ({"weight_map": None}, f"{INDEX}: weight_map is missing or empty"),
        ({"weight_map": ["a"]}, f"{INDEX}: weight_map is missing or empty"),
        ({"weight_map": {"a": 3}}, f"{INDEX}: a: '3' is not a file name"),
        ({"weight_map": {"a": None}}, f"{INDEX}: a: 'None' is not a file name"),
        ({"weight_map": {"a": ""}}, f"{INDEX}: a: '' is not a file name"),
        ({"weight_map": {"a": "../model.safetensors"}}, f"{INDEX}: a: '../model.safetensors' is not a file name"),
        ({"weight_map": {"a": "/etc/passwd"}}, f"{INDEX}: a: '/etc/passwd' is not a file name"),
        ({"weight_map": {"a": "x\\y.safetensors"}}, "is not a file name"),
        ({"weight_map": {"a": ".."}}, f"{INDEX}: a: '..' is not a file name"),
        ({"weight_map": {"a": "a\n.safetensors"}}, f"{INDEX}: a: 'a\\n.safetensors' is not a file name"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "is not a file name"),
        ({"weight_map": {"a": "x" * 300}}, "is not a file name"),
        ({"weight_map": {"a": "config.json"}}, f"{INDEX}: a: 'config.json' is not a .safetensors file"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "'pytorch_model.bin' is not a .safetensors file"),
        ({"weight_map": {"a": FILE, "b": "b.safetensors"}}, f"{INDEX}: names b.safetensors, which is not there (download it again)"),
        ({"weight_map": {"a": "other.safetensors"}}, f"has both {FILE} and {INDEX} (remove the one that is stale)"),
        ({"weight_map": {"a": FILE, "b": "MODEL.safetensors"}}, f"{INDEX}: names files that differ only in case"),
        ({"weight_map": {"a": FILE, "b": FILE}}, f"the index places b in {FILE}, which does not hold it"),
        ({"weight_map": {"b": FILE}}, f"{FILE} holds a, the index places it in None"),
        (b'{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}', f"{INDEX}: key 'a' appears twice"),
        ({"weight_map": {"a": FILE}, "metadata": {"total_size": -1}}, f"{INDEX}: total_size is -1"),
        ({"weight_map": {"a": FILE}, "metadata": {"total_size": "12"}}, f"{INDEX}: total_size is '12'"),
        ({"weight_map": {"a": FILE}, "metadata": {"total_size": True}}, f"{INDEX}: total_size is True"),
        ({"weight_map": {"a": FILE}, "metadata": {"total_size": float("nan")}}, f"{INDEX}: total_size is nan"),
        ({"weight_map": {"a": FILE}, "metadata": {"total_size": [12]}}, f"{INDEX}: total_size is [12]"),
    ],
)  # fmt: skip
def test_an_index_that_is_wrong(tmp_path: Path, content: bytes | object, message: str) -> None:
    save(tmp_path / FILE, ONE)
    write(tmp_path, INDEX, content)
    assert message in refusal(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path / name, ONE)
    index(tmp_path, {"a": "a.safetensors", "x": "b.safetensors"})
    assert refusal(tmp_path) == "tensor a is in both a.safetensors and b.safetensors"


def test_a_tensor_in_another_file_than_the_index_says(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", ONE)
    save(tmp_path / "b.safetensors", {"b": tensor("F32", (3,))})
    index(tmp_path, {"a": "b.safetensors", "b": "a.safetensors"})
    assert refusal(tmp_path) == "a.safetensors holds a, the index places it in b.safetensors"


def test_names_that_are_bare() -> None:
    assert all(map(is_bare_name, ["a", ".hidden", "a b", "ünï", "a..b", "...", "x" * 255]))
    assert not any(map(is_bare_name, ["", ".", "..", "a/b", "/", "a\\b", "a\0b", "a\nb", "a\x7f", "\udc80", "x" * 256]))


# ---------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json: is not JSON: Expecting value at line 1, column 1"),
        (b"[]", "config.json: is a JSON list, not an object"),
        (b"null", "config.json: is a JSON NoneType, not an object"),
        (b'"x"', "config.json: is a JSON str, not an object"),
        (b'{"a": 1,}', "config.json: is not JSON: "),
        (b"{'a': 1}", "config.json: is not JSON: "),
        (b'{"a": 1, "a": 2}', "config.json: key 'a' appears twice"),
        (b'{"x": {"a": 1, "a": 2}}', "config.json: key 'a' appears twice"),
        (b'{"a": \xff}', "config.json: is not UTF-8 (byte 6)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json: holds an integer of more than 4300 digits"),
        (b'{"a":' * 100_000, "config.json: is nested too deeply"),
        (b"[" * 100_000, "config.json: is nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\n", "config.json: is a Git LFS pointer (run: git lfs pull)"),
    ],
)
def test_a_config_that_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    save(tmp_path / "model.safetensors", ONE)
    write(tmp_path, "config.json", content)
    assert refusal(tmp_path).startswith(message)


@pytest.mark.parametrize("content", [b"{}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'\n{"a": {}}\n'])
def test_a_config_that_is_odd(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, "config.json", content)
    read_config(tmp_path)


def test_a_config_that_is_missing_is_empty(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("blob")
    with pytest.raises(InputError, match=r"config.json: is not there"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="config.json: is not a regular file"):
        read_config(tmp_path)


def test_json_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x.json", b"{}" + b" " * 100)
    monkeypatch.setattr(folder_module, "MAX_JSON", 50)
    with pytest.raises(InputError, match=r"x.json: has 102 bytes, at most 50 are read"):
        read_json(tmp_path / "x.json")


def test_an_unreadable_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    write(tmp_path, "config.json", "{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match="config.json: Input/output error"):
        read_config(tmp_path)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    """``auto_map`` names Python files of the folder; they are carried along and not looked at."""
    save(tmp_path / "model.safetensors", ONE)
    write(tmp_path, "config.json", config(auto_map={"AutoModel": "modeling_x.Model"}, trust_remote_code=True))
    write(tmp_path, "modeling_x.py", "raise SystemExit('was run')")
    assert open_full(tmp_path).carried == ("config.json", "modeling_x.py")


# ---------------------------------------------------------------------------------------------- what goes along


def test_carried(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model", "README.md", "LICENSE", "special tokens.txt", "ünï.txt"):
        write(tmp_path, name, "x")
    for name in (
        "model.safetensors", "pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "tf.h5", "flax.msgpack", "x.onnx", "x.gguf",
        "model.safetensors.index.json", "pytorch_model.bin.index.json", "tpshard.json", ".gitattributes",
        "model.safetensors.incomplete", "x.lock",
    ):  # fmt: skip
        write(tmp_path, name, "x")
    for name in ("1_Pooling", ".cache", "onnx"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "config.json", "{}")
        write(tmp_path / name, "model.onnx", "x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(".")
    assert carried_files(tmp_path) == [
        "1_Pooling/config.json", "LICENSE", "README.md", "config.json", "onnx/config.json", "special tokens.txt",
        "tokenizer.model", "ünï.txt",
    ]  # fmt: skip


def test_large_files_are_not_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_CARRIED", 10)
    write(tmp_path, "small.txt", "x" * 10)
    write(tmp_path, "large.txt", "x" * 11)
    assert carried_files(tmp_path) == ["small.txt"]


@pytest.mark.parametrize("name", [b"a\\b.txt", b"a\nb.txt", b"\x1b[31m.txt", b"\xff.txt"])
def test_names_that_no_manifest_can_record(tmp_path: Path, name: bytes) -> None:
    """Refused before anything is written: a split that cannot be merged again would be a trap."""
    save(tmp_path / "model.safetensors", ONE)
    Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_text("x")
    message = refusal(tmp_path)
    assert message.startswith("file name '")
    assert message.endswith("' cannot be kept (rename it)")
    message.encode()


# ---------------------------------------------------------------------------------------------- quantised


@pytest.mark.parametrize(
    "name",
    ["l.qweight", "l.weight_scale", "l.weight_scale_inv", "l.SCB", "l.weight_packed", "experts.down_proj_blocks"],
)
def test_companions_of_quantised_weights_without_settings(tmp_path: Path, name: str) -> None:
    save(tmp_path / "model.safetensors", {**ONE, name: Tensor("U8", (1,), b"1")})
    with pytest.raises(InputError, match=rf"{name} belongs to a quantised weight, but nothing says how \(put its"):
        read_quantised(open_full(tmp_path))


@pytest.mark.parametrize(
    ("quantisation", "said"),
    [
        ({"quant_method": "awq"}, "config.json says awq, but no tensor is quantised"),
        ({"bits": 4}, "is quantised (unknown): this method is not known"),
        ({"quant_method": "a\x1b[31m"}, r"is quantised (a\x1b[31m): this method is not known"),
        ({"load_in_4bit": True}, "is quantised (bitsandbytes, 4 bits): 4-bit weights are one line of packed numbers"),
        ("fp8", "is quantised (fp8): quantization_config is not an object"),
    ],
)
def test_quantisation_in_config_json(tmp_path: Path, quantisation: object, said: str) -> None:
    save(tmp_path / "model.safetensors", ONE)
    for text in (
        config(quantization_config=quantisation),
        {**config(), "text_config": {"quantization_config": quantisation}},
    ):
        write(tmp_path, "config.json", text)
        with pytest.raises(InputError) as caught:
            read_quantised(open_full(tmp_path))
        assert said in str(caught.value)


def test_dense_checkpoints_are_not_quantised(source: Path) -> None:
    assert not read_quantised(open_checkpoint(source)).weights
    text = json.loads((source / "config.json").read_text())
    for nothing in (None, {}):
        write(source, "config.json", {**text, "quantization_config": nothing})
        assert not read_quantised(open_checkpoint(source)).weights
