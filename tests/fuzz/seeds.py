"""Inputs to begin with: small valid ones of every form, and known bad ones. ``python -m tests.fuzz.seeds`` writes those
that the corpus does not have yet; what the fuzzer found has names of its own there."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from tests.build import POLICY, config, entry, file_bytes
from tests.fuzz.targets import shards

CORPUS = Path(__file__).parent / "corpus"
DATA = Path(__file__).parent.parent / "data" / "tensorflow"
Seeds = Iterator[tuple[str, bytes]]


def header() -> Seeds:
    yield "empty", file_bytes({})
    yield "metadata", file_bytes({"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 3], 0, 24)}, bytes(24))
    types = {"wide": ("F64", [1], 8), "half": ("BF16", [2, 2], 8), "bool": ("BOOL", [], 1), "none": ("I32", [0, 7], 0),
             "four": ("F4", [2], 1), "fp8": ("F8_E4M3", [5], 5)}  # fmt: skip
    table, at = {}, 0
    for name, (dtype, shape, size) in types.items():
        table[name] = entry(dtype, shape, at, at + size)
        at += size
    yield "types", file_bytes(table, bytes(at))
    yield "hole", file_bytes({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3))
    yield "twice", file_bytes('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{}}', bytes(1))
    yield "escape", file_bytes({"\x1b[31m../é": entry("U8", [], 0, 1)}, bytes(1))
    yield "huge", file_bytes({"a": entry("U8", [2**62, 0], 0, 0)})
    yield "long", file_bytes("{}", length=2**64 - 1)
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\n"


def policy() -> Seeds:
    yield "tiny", POLICY.encode()
    folder = resources.files("tpshard").joinpath("policies")
    for name in ("llama.yaml", "gpt2.yaml", "moe.yaml"):
        if folder.joinpath(name).is_file():
            yield name, folder.joinpath(name).read_bytes()[:3000].rpartition(b"\n")[0]
    yield (
        "every-key",
        (
            b"name: all\nextends: llama\ndescription: x\nfor: {model_type: [a, b], n: 3}\nvars: {A: n_head | 2 * B, B: 4}\n"
            b"rules:\n  a.{b,c}: {rule: column, heads: A, gather: true}\n  q_proj: {rule: column, dims: oi, unit: 2}\n"
            b"  k_proj: {rule: column, parts: [[1, 12], [2, 9]], uneven: true}\n  v_proj: {rule: row, pad: 8}\n"
            b"  '**.experts.*': {rule: column, experts: A, stacked: 2}\n  norm: {rule: replicate, gather: input}\n"
            b"default: replicate\nstages: {layers: model.layers, first: embed, last: [norm, head], every: r, tied: {a: b}}\n"
        ),
    )
    yield "two", b"name: a\nrules: {x: row}\ndefault: replicate\n---\nname: b\nextends: a\n"
    yield "alias", b"name: &x a\nrules: {a: *x}\n"
    yield "tag", b"!!python/object/apply:os.system [x]\n"
    yield "numbers", b"name: n\nrules: {a: {rule: column, unit: 010}}\n"
    yield "deep", b"name: " + b"[" * 30 + b"]" * 30


def manifest() -> Seeds:
    raw = (shards() / "tpshard.json").read_bytes()
    yield "shards", raw
    table = json.loads(raw)
    yield "none", json.dumps({**table, "tensors": [], "files": []}).encode()
    yield "grid", json.dumps({**table, "mesh": {"pp": 1, "ep": 2, "tp": 1}}).encode()
    yield "engine", json.dumps({**table, "engine": "vllm"}).encode()
    yield "half", json.dumps({**table, "engine": "\ud800"}).encode()
    first = table["tensors"][0]
    yield (
        "copy",
        json.dumps(
            {**table, "tensors": [*table["tensors"], {**first, "name": "c", "copy_of": first["name"]}]}
        ).encode(),
    )


def index() -> Seeds:
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    yield "good", json.dumps({"metadata": {"total_size": 9}, "weight_map": {"a": names[0], "b": names[1]}}).encode()
    yield "absent", json.dumps({"weight_map": {"a": "model-00003-of-00002.safetensors"}}).encode()
    yield "path", json.dumps({"weight_map": {"a": "../x.safetensors", "b": 3}}).encode()
    yield "total", json.dumps({"metadata": {"total_size": -1.5}, "weight_map": {"a": names[0]}}).encode()


def config_seeds() -> Seeds:
    yield "tiny", json.dumps(config()).encode()
    for model_type in ("llama", "gpt2", "mixtral", "bert", "keras_sequential"):
        yield (
            model_type,
            json.dumps({**config(), "model_type": model_type, "architectures": ["X"], "tie": None}).encode(),
        )
    yield (
        "nested",
        json.dumps({"model_type": "llava", "text_config": config(), "vision_config": {"a": [1, 2.5]}}).encode(),
    )
    keras = DATA / "ckpt" / "config.json"
    yield "keras", keras.read_bytes()


def expression() -> Seeds:
    texts = ["num_attention_heads", "hidden_size / num_attention_heads", "a + b - c // 2", "nested.list[2].deep | 3",
             "-(hidden_size)", "9" * 40, "((((1))))", "missing | missing", "x if y else z", "mlp.{up,down}_proj", "**.a*b.{c,d}"]  # fmt: skip
    for number, text in enumerate(texts):
        yield f"{number:02d}", text.encode()


def pickled() -> Seeds:
    value: Any = {"a": [1, 2.5, None, True, "text", b"bytes", 2**80], ("t", 1): OrderedDict(x=1), "s": {1, 2}}
    for protocol in range(6):
        yield f"protocol-{protocol}", pickle.dumps(value, protocol)
    yield "call", b"cposix\nsystem\n(U\x02lstR."
    yield "object", b"\x80\x04\x8c\x01a\x8c\x01b\x93)\x81}b."
    yield "itself", b"]q\x00h\x00a."


def torch_file() -> Seeds:
    import torch

    held = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)[1:3], "n": 1}
    for old in (False, True):
        raw = io.BytesIO()
        torch.save(held, raw, _use_new_zipfile_serialization=not old)
        yield "old" if old else "new", raw.getvalue()


def dcp() -> Seeds:
    import torch
    from torch.distributed import checkpoint

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = {"a": torch.zeros(2, 3), "nested": {"b": torch.zeros(4)}, "n": 1}
        checkpoint.save(held, checkpoint_id=folder)
        yield "saved", (Path(folder) / ".metadata").read_bytes()


def zip_directory() -> Seeds:
    for name, compression in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        raw = io.BytesIO()
        with zipfile.ZipFile(raw, "w", compression) as file:
            for member in ("a/data.pkl", "a/data/0", "é"):
                file.writestr(zipfile.ZipInfo(member), b"x" * 9)
        yield name, raw.getvalue()
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file, file.open(zipfile.ZipInfo("big"), "w", force_zip64=True) as member:
        member.write(b"y")
    yield "zip64", raw.getvalue()
    yield "empty", b"PK\x05\x06" + bytes(18)


def tensorflow() -> Seeds:
    for path in sorted(DATA.rglob("*.index")):
        yield path.parent.name, path.read_bytes()
    yield "graph", b"\x0a" + bytes(4) + b"\x0a\x08\x12\x06\x1a\x01k\x12\x01v"


def frame() -> Seeds:
    for around in ([], [[0, 3], [10, 2]]):
        content = bytes(sum(length for _, length in around))
        table = {"format": "tpshard-frame", "version": 1, "size": 12, "around": around, "starts": {"a": 3}}
        text = json.dumps(table).encode()
        yield f"of-{len(around)}", struct.pack("<Q", len(text)) + text + zlib.compress(content)
    table["starts"] = []
    yield "no-table", struct.pack("<Q", len(json.dumps(table))) + json.dumps(table).encode() + zlib.compress(bytes(5))


def journal() -> Seeds:
    run = dict.fromkeys(("version", "source", "policy", "ranks", "files", "digest"), "0" * 32)
    head: dict[str, Any] = {
        "format": "tpshard-journal",
        "version": 1,
        "run": run,
        "files": ["a.safetensors", "b/config.json"],
    }
    file = {"name": "a.safetensors", "rank": 0, "part": 0, "size": 9, "digest": "0" * 32}
    portion = {"files": [file], "first": 0, "digests": ["0" * 32], "shards": [[None, "0" * 32]]}
    yield "run", b"\n".join(json.dumps(line).encode() for line in (head, portion, portion))
    yield "outside", json.dumps({**head, "files": ["../source/model.safetensors", "/etc/passwd"]}).encode()
    yield "numbers", json.dumps({**head, "files": [1]}).encode()


SEEDS = {
    "header": header, "policy": policy, "manifest": manifest, "index": index, "config": config_seeds,
    "expression": expression, "pickle": pickled, "torch": torch_file, "dcp": dcp, "zip": zip_directory,
    "tensorflow": tensorflow, "frame": frame, "journal": journal,
}  # fmt: skip

if __name__ == "__main__":
    for target, seeds in SEEDS.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, content in seeds():
            if not (CORPUS / target / name).exists():
                (CORPUS / target / name).write_bytes(content)
