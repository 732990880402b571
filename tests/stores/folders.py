"""Folders in stores, for the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.servers import Server
from tpshard.stores import store as opened_stores
from tpshard.stores.path import StorePath, place

_numbers = itertools.count()


def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new folder there; its environment, until the test ends."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    opened_stores._opened.clear()
    yield f"{server.root}/{next(_numbers)}"
    opened_stores._opened.clear()


def upload(folder: Path, url: str) -> str:
    """Every file of a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            there = place(f"{url}/{path.relative_to(folder).as_posix()}")
            assert isinstance(there, StorePath)
            assert there.store.create(there.key, path.read_bytes())
    return url


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder, wherever it is, by its path in it."""
    where = place(folder)
    return {path.relative_to(where).as_posix(): path.read_bytes() for path in where.rglob("*") if path.is_file()}
