"""What is asked of an engine's settings, and the answer of an engine that keeps nothing of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.engines.joints import Joined
from tpshard.frames import Tensor
from tpshard.header import Entry
from tpshard.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Told:
    """What an opened folder says: the headers of all ranks, and what the first file of each holds beside tensors.
    ``store``: whether it is one store, whose ranks may have been others."""

    folder: Path
    mesh: Mesh
    ranks: Sequence[Mapping[str, Entry]]
    objects: Sequence[Mapping[Any, Any]]
    store: bool = False


class Settings:
    """``own_files``: names of files that mean something to the engine alone; no other folder gets them. ``inert``:
    names in its pickles that are kept as records which do nothing."""

    own_files: Collection[str] = ()
    inert: Collection[tuple[str, str]] = ()

    def mesh(self, folder: Path) -> Mesh | None:
        """The ranks that a folder is of, where that is told by more than the names of its files."""
        return None

    def given(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model's config.json, from what a user gave as such: it may be the engine's own."""
        return dict(config)

    def config(self, told: Told) -> dict[str, Any]:
        """The model's config.json, from the engine's own; empty where it has none. Raises InputError where it
        disagrees with the tensors."""
        return {}

    def version(self, told: Told) -> str:
        """Of the files, where their layout depends on it; empty for the present one."""
        return ""

    def files(self, joined: Joined) -> dict[str, bytes]:
        """Files that the engine wants beside the weights."""
        return {}

    def objects(self, joined: Joined, rank: int, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Values that it wants in each PyTorch file, beside the tensors."""
        return {}
