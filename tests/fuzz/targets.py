"""One function for each parser: bytes in; it returns, or raises TpshardError, and nothing else.

Where a reader that nobody here wrote is at hand, a target asks it as well: what both accept must mean the same, and what
only we refuse must be on the list of what we refuse on purpose.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import safetensors
import xxhash

from tests.build import POLICY, config, save, tensor, tiny_shapes
from tpshard.assignment import assign
from tpshard.containers import read_frame
from tpshard.convert import plan_merge, plan_split
from tpshard.dcp_metadata import parse_dcp_metadata
from tpshard.errors import InputError, TpshardError
from tpshard.expressions import evaluate
from tpshard.folder import find_weights
from tpshard.header import parse_json_object, read_header
from tpshard.journal import Journal
from tpshard.library import choose_policy, policies_of_text, policy_as_data, policy_from_data
from tpshard.manifest import manifest_bytes, seal_of
from tpshard.manifest_parsing import parse_manifest
from tpshard.patterns import PatternError, parse_patterns
from tpshard.pickles import PLAIN, PickleReader
from tpshard.tensorflow_index import object_graph, parse_index
from tpshard.torch_state import read_torch_file
from tpshard.zips import read_members

# Of files that the safetensors library reads, we refuse only these (docs/errors.md: they could fool somebody).
ON_PURPOSE = (
    "appears twice", "is a path", "control characters", "an empty name", "characters, at most", "dimensions, at most",
    "is beyond any file", "differ only in how", "does not begin with '{'", "has the fields", "is nested too deeply",
    "digits", "is not a table of texts", "not a whole number of bytes", "values, at most",
)  # fmt: skip


SCRATCH = "TPSHARD_FUZZ_SCRATCH"


@contextlib.contextmanager
def in_memory(data: bytes) -> Iterator[tuple[int, Path]]:
    """A file that has a descriptor and a path, and lies on no disk."""
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        yield fd, Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


@cache
def scratch() -> Path:
    """A folder for readers of folders: what the fuzzer was given, which ends without cleaning up, or one of our own."""
    if SCRATCH in os.environ:
        return Path(os.environ[SCRATCH])
    made = scratch_in_memory()
    _KEPT.append(made)
    return Path(made.name)


def scratch_in_memory() -> tempfile.TemporaryDirectory[str]:
    """In memory where that is to be had."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="tpshard-fuzz-", dir=place)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def header(data: bytes) -> None:
    """A safetensors file; the safetensors library as the judge."""
    with in_memory(data) as (_, path):
        try:
            ours = read_header(path)
        except InputError as error:
            if any(what in str(error) for what in ON_PURPOSE):
                raise
            with contextlib.suppress(safetensors.SafetensorError):
                theirs = safetensors.deserialize(data)
                raise AssertionError(f"refused without need: {error}: {theirs}") from None
            raise
    # deserialize knows no 4-bit or 6-bit types; safe_open, which read_header asks, does
    if not any(entry.dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0") for entry in ours.entries.values()):
        found = {name: (tuple(told["shape"]), len(told["data"])) for name, told in safetensors.deserialize(data)}
        assert found == {name: (entry.shape, entry.size) for name, entry in ours.entries.items()}


def policy(data: bytes) -> None:
    """A policy's YAML, used on a small checkpoint; what is recorded of it must mean the same."""
    text = _text(data)
    for found in policies_of_text(text, "fuzz.yaml"):
        layouts = assign(found, config(), tiny_shapes(layers=1), 3).tensors
        again = policy_from_data(json.loads(json.dumps(policy_as_data(found))), "manifest")
        assert assign(again, config(), tiny_shapes(layers=1), 3).tensors == layouts


def config_json(data: bytes) -> None:
    """A config.json, under a policy of ours and under the built-in one that it asks for."""
    table = parse_json_object(data, "config.json")
    with contextlib.suppress(TpshardError):
        assign(policies_of_text(POLICY, "tiny.yaml")[0], table, tiny_shapes(layers=1), 3)
    assign(choose_policy("auto", table), table, tiny_shapes(layers=1), 3)


def manifest(data: bytes) -> None:
    """A manifest with a true seal: sums keep no fool out. What was accepted is planned on, over real shards, and comes
    back the same from what we would write."""
    table = parse_json_object(data, "tpshard.json")
    table.pop("seal", None)
    with contextlib.suppress(ValueError):  # half characters have no UTF-8, so no seal
        table["seal"] = seal_of(table)
    found = parse_manifest(table, "tpshard.json")
    raw = manifest_bytes(found)
    assert parse_manifest(json.loads(raw), "again") == found
    folder = shards()
    (folder / "tpshard.json").write_bytes(raw)
    for _ in plan_merge(folder, folder.parent / "merged").plan.transfers():
        pass


@cache
def shards() -> Path:
    """A small folder of two ranks, cut from the checkpoint of ``small``."""
    from tpshard.conversion import run

    source, target = scratch() / "small", scratch() / "shards"
    source.mkdir()
    names = ("a.weight", "b.weight", "norm.weight")
    save(source / "model.safetensors", {name: tensor("F32", (4, 6)) for name in names}, {"format": "pt"})
    (source / "config.json").write_text('{"model_type": "small"}')
    (scratch() / "small.yaml").write_text("name: small\nrules: {a: column, b: row}\ndefault: replicate\n")
    run(plan_split(source, target, 2, str(scratch() / "small.yaml")))
    return target


def index(data: bytes) -> None:
    """model.safetensors.index.json, in a folder with two files."""
    folder = scratch() / "indexed"
    if not folder.is_dir():
        folder.mkdir()
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            (folder / name).write_bytes(b"")
    (folder / "model.safetensors.index.json").write_bytes(data)
    find_weights(folder)


def pickled(data: bytes) -> None:
    """A pickle: read as plain values with all names inert."""
    PickleReader("fuzz.pkl", PLAIN, others=True).read(data)


def torch_file(data: bytes) -> None:
    """A file of torch.save, either format."""
    with in_memory(data) as (_, path):
        read_torch_file(path)


def dcp(data: bytes) -> None:
    """The .metadata of a distributed checkpoint."""
    parse_dcp_metadata(data, ".metadata")


def zip_directory(data: bytes) -> None:
    """A zip file; what we accept, Python's zipfile must read alike."""
    with in_memory(data) as (fd, path):
        found = read_members(fd, len(data), path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as theirs:
            members = {info.filename: info.file_size for info in theirs.infolist()}
    except (zipfile.BadZipFile, NotImplementedError):  # fields that we have no use for
        return
    if all(name.isascii() for name in found):  # others' encoding depends on a flag
        assert members == {name: member.size for name, member in found.items()}


def tensorflow(data: bytes) -> None:
    """A TensorFlow index, or the graph of objects in a checkpoint."""
    with contextlib.suppress(TpshardError):
        object_graph(data, "graph")
    parse_index(data, "ckpt.index")


def frame(data: bytes) -> None:
    """What is kept of a Keras or TensorFlow file around its tensors."""
    with in_memory(data) as (_, path):
        read_frame(path)


def expression(data: bytes) -> None:
    """An expression over config keys, and the same text as a rule's key."""
    text = _text(data)
    with contextlib.suppress(PatternError):
        for pattern in parse_patterns(text):
            pattern.matches("model.layers.0.self_attn.q_proj")
    evaluate(
        text, {**config(), "nested": {"list": [1, 2, {"deep": 3}]}}, {"a": "b + b", "b": "c * 2", "c": "hidden_size"}
    )


def journal(data: bytes) -> None:
    """The journal of a run that ended early, each line with a true digest."""
    path = scratch() / "target.journal"
    path.write_bytes(
        b"".join(xxhash.xxh3_64_hexdigest(line).encode() + b" " + line + b"\n" for line in data.split(b"\n"))
    )
    opened = Journal(path, scratch() / "target")
    opened.close()
    folder = Path("/folder")
    for name in opened.head.files if opened.head else ():
        assert folder in Path(os.path.normpath(folder / name)).parents, "a file that is not in the folder"


def planted(data: bytes) -> None:
    """A fault on purpose, for the test of the fuzzer itself."""
    if b"ZZ" in data:
        raise ZeroDivisionError("planted")


def _text(data: bytes) -> str:
    """As files are read: UTF-8, or an error that is tested elsewhere."""
    return data.decode("utf-8", "replace")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "policy": policy,
    "manifest": manifest,
    "index": index,
    "config": config_json,
    "expression": expression,
    "pickle": pickled,
    "torch": torch_file,
    "dcp": dcp,
    "zip": zip_directory,
    "tensorflow": tensorflow,
    "frame": frame,
    "journal": journal,
}
