"""Changing a shard folder by hand, as accident or malice would, with nothing of tpshard but its file format."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

NUMPY: dict[str, Any] = {
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8,
    "F8_E4M3": np.dtype("V1"), "BF16": np.dtype("V2"),
}  # fmt: skip
Tensors = dict[str, tuple[str, list[int], bytes]]  # name → dtype, shape, data


def read_file(path: Path) -> tuple[dict[str, str], Tensors]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    metadata = table.pop("__metadata__", {})
    data = raw[8 + length :]
    return metadata, {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in table.items()}


def write_file(path: Path, metadata: dict[str, str], tensors: Tensors) -> None:
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in tensors.values()))


class Folder:
    """A shard folder with one file for each rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = json.loads((path / "tpshard.json").read_text())

    def file(self, rank: int) -> Path:
        return self.path / self.manifest["files"][rank]["name"]

    @property
    def ranks(self) -> range:
        return range(self.manifest["ranks"])

    def change_file(self, rank: int, change: Callable[[Tensors], None]) -> None:
        metadata, tensors = read_file(self.file(rank))
        change(tensors)
        write_file(self.file(rank), metadata, tensors)

    def change(
        self, name: str, rank: int, change: Callable[[str, list[int], bytes], tuple[str, list[int], bytes]]
    ) -> None:
        self.change_file(rank, lambda tensors: tensors.update({name: change(*tensors[name])}))

    # ------------------------------------------------------------------------------------------ names

    def names(self, part: str) -> list[str]:
        return [entry["name"] for entry in self.manifest["tensors"] if part in entry["name"]]

    def held(self, ending: str) -> str | None:
        """The tensor whose name ends so, if there is one."""
        return next((name for name in self.names(ending) if name.endswith(ending)), None)

    def find(self, ending: str) -> str:
        name = self.held(ending)
        assert name is not None, ending
        return name

    def is_cut(self, name: str) -> bool:
        datas = [read_file(self.file(rank))[1][name][2] for rank in self.ranks]
        return any(data != datas[0] for data in datas)

    # ------------------------------------------------------------------------------------------ bytes

    def rearrange(self, name: str, rank: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Other numbers, or the same elsewhere, in a tensor of the same shape."""

        def changed(dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
            new = change(np.frombuffer(data, NUMPY[dtype]).reshape(shape))
            assert list(new.shape) == shape, name
            return dtype, shape, new.tobytes()

        self.change(name, rank, changed)

    def exchange_ranks(self, name: str, one: int, other: int) -> None:
        first, second = (read_file(self.file(rank))[1][name] for rank in (one, other))
        assert first[1] == second[1], name
        self.change(name, one, lambda *_: second)
        self.change(name, other, lambda *_: first)

    def pad_rows(self, name: str, count: int) -> None:
        for rank in self.ranks:
            self.change(
                name, rank, lambda d, s, data: (d, [s[0] + count, *s[1:]], data + bytes(len(data) // s[0] * count))
            )

    def flip_bit(self, name: str, rank: int, byte: int) -> None:
        def flip(dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
            return dtype, shape, data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :]

        self.change(name, rank, flip)

    def set_bytes(self, name: str, rank: int, at: int, new: bytes) -> None:
        self.change(name, rank, lambda d, s, data: (d, s, data[:at] + new + data[at + len(new) :]))

    def cast(self, name: str, dtype: str) -> None:
        for rank in self.ranks:
            self.change(
                name, rank, lambda d, s, data: (dtype, s, np.frombuffer(data, NUMPY[d]).astype(NUMPY[dtype]).tobytes())
            )
        self.entry(name)["dtype"] = dtype

    def copy_rank(self, name: str, source: int, target: int) -> None:
        data = read_file(self.file(source))[1][name]
        self.change(name, target, lambda d, s, _: (d, s, data[2]))

    def exchange(self, one: str, other: str) -> None:
        for rank in self.ranks:

            def swap(tensors: Tensors) -> None:
                tensors[one], tensors[other] = tensors[other], tensors[one]

            self.change_file(rank, swap)

    def rename_layers(self, one: str, other: str) -> None:
        def renamed(name: str) -> str:
            a, b = f"{one}.", f"{other}."
            return name.replace(a, b) if a in name else name.replace(b, a)

        for rank in self.ranks:
            metadata, tensors = read_file(self.file(rank))
            write_file(self.file(rank), metadata, {renamed(name): value for name, value in tensors.items()})
        for entry in self.manifest["tensors"]:
            entry["name"] = renamed(entry["name"])

    def fill(self, name: str, rank: int, value: int) -> None:
        self.change(name, rank, lambda d, s, data: (d, s, bytes([value]) * len(data)))

    def randomise(self, name: str, rank: int) -> None:
        random = np.random.default_rng(1)
        self.change(
            name, rank, lambda d, s, data: (d, s, random.standard_normal(len(data) // 4).astype(np.float32).tobytes())
        )

    def swap_bytes(self, name: str, rank: int) -> None:
        self.change(name, rank, lambda d, s, data: (d, s, np.frombuffer(data, NUMPY[d]).byteswap().tobytes()))

    def turn_shape(self, name: str, rank: int) -> None:
        self.change(name, rank, lambda d, s, data: (d, s[::-1], data))

    def drop(self, name: str) -> None:
        for rank in self.ranks:
            self.drop_from_rank(name, rank)
        self.manifest["tensors"] = [entry for entry in self.manifest["tensors"] if entry["name"] != name]
        for table, key in (("layouts", "layout"), ("roles", "role")):  # as they are written: those in use
            used = list(dict.fromkeys(entry[key] for entry in self.manifest["tensors"]))
            self.manifest[table] = [self.manifest[table][index] for index in used]
            for entry in self.manifest["tensors"]:
                entry[key] = used.index(entry[key])

    def drop_from_rank(self, name: str, rank: int) -> None:
        self.change_file(rank, lambda tensors: tensors.pop(name) and None)

    def add_to_rank(self, name: str, rank: int) -> None:
        self.change_file(rank, lambda tensors: tensors.update({name: ("F32", [3], bytes(12))}))

    def truncate(self, rank: int) -> None:
        self.file(rank).write_bytes(self.file(rank).read_bytes()[:-1])

    def zero_tail(self, rank: int) -> None:
        self.file(rank).write_bytes(self.file(rank).read_bytes()[:-64] + bytes(64))

    # ------------------------------------------------------------------------------------------ files

    def exchange_files(self, one: int, other: int) -> None:
        a, b = self.file(one).read_bytes(), self.file(other).read_bytes()
        self.file(one).write_bytes(b)
        self.file(other).write_bytes(a)

    def remove(self, rank: int) -> None:
        self.file(rank).unlink()

    def write(self, name: str, content: str = "stale") -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_text(content)

    def edit(self, change: Callable[[dict[str, Any]], object], seal: bool = False) -> None:
        """Change the manifest; unless ``seal``, leave its seal as it was."""
        change(self.manifest)
        if seal:
            self._seal()
        self._write_manifest()

    def prefix_manifest(self, begin: str) -> None:
        """Another text in place of the manifest's opening brace."""
        (self.path / "tpshard.json").write_text(begin + json.dumps(self.manifest)[1:])

    def edit_config(self, **fields: object) -> None:
        """None: without the field."""
        path = self.path / "config.json"
        changed = json.loads(path.read_text()) | fields
        path.write_text(
            json.dumps({key: value for key, value in changed.items() if key not in fields or value is not None})
        )

    def entry(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.manifest["tensors"] if entry["name"] == name)

    def reseal(self) -> None:
        """Make sizes, digests and seal agree with what now lies there (whole tensors' digests stay)."""
        self.manifest["digest"] = "xxh3-128"  # of whole files, which needs no headers that can be read
        for record in self.manifest["files"]:
            path = self.path / record["name"]
            if path.is_file():
                record.update(size=path.stat().st_size, digest=_digest(path.read_bytes()))
        for record in self.manifest["carried"]:
            content = (self.path / record["name"]).read_bytes()
            record.update(size=len(content), digest=_digest(content))
        held = [read_file(self.file(rank))[1] for rank in self.ranks if self.file(rank).is_file()]
        for entry in self.manifest["tensors"]:
            for rank, tensors in enumerate(held):
                if entry.get("shards", [None] * len(held))[rank] and entry["name"] in tensors:
                    entry["shards"][rank] = _digest(tensors[entry["name"]][2])
        self._seal()
        self._write_manifest()

    def _write_manifest(self) -> None:
        """As docs/format.md has it: top-level keys and items of top-level lists on lines of their own."""
        lines = []
        for key, value in self.manifest.items():
            text = json.dumps(value, ensure_ascii=False)
            if isinstance(value, list) and value:
                items = (json.dumps(item, separators=(",", ":"), ensure_ascii=False) for item in value)
                text = "[\n" + ",\n".join(f"  {item}" for item in items) + "\n ]"
            lines.append(f"{json.dumps(key)}: {text}")
        (self.path / "tpshard.json").write_text("{\n " + ",\n ".join(lines) + "\n}\n", "utf-8", "surrogatepass")

    def _seal(self) -> None:
        self.manifest.pop("seal", None)
        canonical = json.dumps(self.manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self.manifest["seal"] = hashlib.sha256(canonical.encode()).hexdigest()


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()
