"""The fuzzers' corpus, replayed without the fuzzer: every input is read, or refused in one line."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest

from tests.build import file_bytes
from tests.fuzz.__main__ import fuzz
from tests.fuzz.seeds import CORPUS
from tests.fuzz.targets import TARGETS, in_memory
from tpshard.errors import InputError, TpshardError
from tpshard.header import read_header
from tpshard.tensorflow_index import MAGIC, parse_index

GOOD = {
    "header": ["empty", "metadata", "types"],
    "policy": ["tiny", "every-key", "two"],
    "manifest": ["shards"],
    "index": ["good"],
    "config": ["llama"],
    "expression": ["00"],
    "pickle": [f"protocol-{number}" for number in range(2, 6)],
    "torch": ["new", "old"],
    "dcp": ["saved"],
    "zip": ["stored", "zip64", "empty"],
    "tensorflow": ["ckpt", "variables", "slices"],
    "frame": ["of-0", "of-2"],
    "journal": ["run", "outside"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_read_or_refused(name: str) -> None:
    paths = sorted((CORPUS / name).iterdir())
    assert set(GOOD[name]) <= {path.name for path in paths}
    for path in paths:
        try:
            TARGETS[name](path.read_bytes())
        except TpshardError as error:
            assert "\n" not in str(error), path.name
            assert path.name not in GOOD[name], f"{path.name}: {error}"


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 300_000


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
def test_the_fuzzer_finds_what_is_planted(tmp_path: Path) -> None:
    (tmp_path / "kept/planted").mkdir(parents=True)
    (tmp_path / "kept/planted/seed").write_bytes(b"ZYXZ")
    outcome = fuzz("planted", 100_000, 0, tmp_path / "kept", tmp_path / "found")
    assert outcome.failure == "ZeroDivisionError: planted"
    assert [b"ZZ" in path.read_bytes() for path in (tmp_path / "found").iterdir()] == [True]


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
def test_a_run_is_counted(tmp_path: Path) -> None:
    outcome = fuzz("expression", 3000, 0, tmp_path / "kept", tmp_path / "found")
    assert (outcome.inputs, outcome.failure) == (3000, "")
    assert not (tmp_path / "found").exists()


def test_a_header_of_many_small_values_is_refused_before_it_takes_the_memory() -> None:
    raw = b'{"a":[' + b"[]," * 4_000_001 + b"[]]}"
    with in_memory(file_bytes(raw)) as (_, path), pytest.raises(InputError, match=r"values, at most 8000000 are read"):
        read_header(path)


def test_a_tensorflow_index_names_no_block_twice() -> None:
    """10,000 names of a block of 10,000 entries would be 100 million entries."""
    entry = b"\0\x01\0a"
    block = entry + struct.pack("<II", 0, 1) + bytes(5)
    handles = b"".join(b"\0\x01\x02" + bytes([65 + number]) + bytes([0, len(block) - 5]) for number in range(2))
    listed = handles + struct.pack("<II", 0, 1) + bytes(5)
    footer = bytes([0, 0, len(block), len(listed) - 5]).ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    with pytest.raises(InputError, match="a block begins at byte 0, the one before it ends at 12"):
        parse_index(block + listed + footer, "x.index")
