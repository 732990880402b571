"""What every engine's tests do: run a command, read what a folder holds, and hold two of them against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tpshard.cli.main import _run

Tensors = Mapping[str, torch.Tensor]


def do(*words: str | Path) -> None:
    """A command that succeeds."""
    assert _run([*map(str, words), "--quiet"]) == 0


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str | Path) -> str:
    """The one line of a command that does not."""
    capsys.readouterr()
    got = _run([*map(str, words)])
    out, err = capsys.readouterr()
    assert (got, out) == (code, ""), err
    assert err.startswith("tpshard: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("tpshard: error: ").rstrip("\n")


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(have: Tensors, want: Tensors) -> None:
    """Names, dtypes, shapes and bits."""
    assert sorted(have) == sorted(want)
    for name, tensor in want.items():
        own = have[name]
        assert (own.dtype, own.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(own.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def assert_ranks(
    folder: Path, files: str, load: Callable[[Path], Tensors], want: list[dict[str, torch.Tensor]]
) -> None:
    """Each rank's file holds what it should, and nothing else; ``files``: a name with a place for the rank."""
    names = [files.format(rank) for rank in range(len(want))]
    assert sorted(path.name for path in folder.glob(f"*{Path(files).suffix}")) == sorted(names)
    for name, tensors in zip(names, want, strict=True):
        assert_same(load(folder / name), tensors)


def flip(path: Path, place: int = -20) -> None:
    """One bit of a file's, ``place`` bytes before its end."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def verdict(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """verify's exit code, and what it says."""
    capsys.readouterr()
    code = _run(["verify", *map(str, words)])
    return code, "".join(capsys.readouterr())
