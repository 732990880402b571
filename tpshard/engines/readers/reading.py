"""What readers share: files with their headers read, and a checkpoint made of tensors with layouts and places."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tpshard.checkpoint import Checkpoint, Place, Stored, WeightFile, weight_file
from tpshard.engines.readers.kind import Asked
from tpshard.engines.unrecorded import unrecorded, unrecorded_tensor
from tpshard.errors import InputError, PolicyError, printable
from tpshard.folder import CONFIG, carried_files, config_bytes, read_config
from tpshard.header import Entry, Header, check_names, read_header
from tpshard.layout import Layout
from tpshard.library import choose_policy
from tpshard.manifest import FileRecord
from tpshard.mesh import Mesh
from tpshard.pickle_machine import Global
from tpshard.policy import Policy, Rule
from tpshard.roles import Role
from tpshard.torch_files import TorchTree, read_torch_tree
from tpshard.torch_state import tensors_under


class Own(NamedTuple):
    """A rank's own tensor: index of the file, and what its header says."""

    file: int
    entry: Entry

    @property
    def place(self) -> Place:
        return Place(self.file, self.entry.offset, self.entry.view)


class Held(NamedTuple):
    """A logical tensor, and where each rank's part of it is."""

    dtype: str
    layout: Layout
    places: tuple[Place | None, ...]


class Reading:
    """A folder being read. ``config``: the model's, as given, or its own, or empty."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.folder = asked, asked.folder
        self.files: list[WeightFile] = []
        self.ranks: list[int] = []
        self.config: Mapping[str, Any] = read_config(asked.folder) if asked.config is None else asked.config
        self.warnings: list[str] = []

    def torch(self, name: str, rank: int, inert: Collection[Global]) -> tuple[int, TorchTree]:
        """A PyTorch file's index and all that it holds."""
        tree = read_torch_tree(self.folder / name, inert)
        return self._add(name, rank, Header({}, {}, 0, tree.file_size)), tree

    def safetensors(self, name: str, rank: int) -> tuple[int, Header]:
        header = read_header(self.folder / name)
        return self._add(name, rank, header), header

    def _add(self, name: str, rank: int, header: Header) -> int:
        self.files.append(weight_file(self.folder, name, header))
        self.ranks.append(rank)
        return len(self.files) - 1

    def tensors(self, value: object, file: int) -> dict[str, Own]:
        """The tensors of a state dict in a file; a warning where it holds something else."""
        path = self.files[file].path
        if not isinstance(value, dict):
            raise InputError(f"{path}: holds no table of tensors where one was expected")
        entries, rest = tensors_under(value, str(path))
        check_names(entries, str(path))
        if rest:
            more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
            self.warn(f"{path.name}: {printable(rest[0])}{more}: no tensor: left out")
        return {name: Own(file, entry) for name, entry in entries.items()}

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def policy(self, needed: bool) -> Policy | None:
        """The model's policy; where it is not needed, None if there is none. Raises InputError, PolicyError."""
        if needed and not self.config:
            what = f"{self.folder}: how its tensors are cut follows from config.json, and there is none"
            raise InputError(what, hint="give the model's with --config")
        try:
            return choose_policy(self.asked.policy, self.config) if self.config else None
        except PolicyError:
            if needed or self.asked.policy != "auto":
                raise
            return None

    def checkpoint(
        self, engine: str, ranks: int, held: Mapping[str, Held], policy: Policy | None, is_own: Callable[[str], bool]
    ) -> Checkpoint:
        """``is_own``: whether a file, by its path in the folder, is the engine's and does not go along."""
        if not held:
            raise InputError(f"{self.folder}: holds no tensors")
        records = {
            n: unrecorded_tensor(n, t.dtype, t.layout, _role(n, t.layout, policy)) for n, t in sorted(held.items())
        }
        listed = [FileRecord(f.name, rank, 0, f.size, "") for f, rank in zip(self.files, self.ranks, strict=True)]
        beside = {}
        if self.asked.config is not None:
            beside[CONFIG] = config_bytes(self.config)
        weights = {file.name for file in self.files}
        apart = {*weights, *beside}
        return Checkpoint(
            folder=self.folder,
            ranks=ranks,
            files=tuple(self.files),
            tensors={n: Stored(n, t.dtype, t.layout, t.places, 0, records[n]) for n, t in sorted(held.items())},
            config=self.config,
            carried=tuple(name for name in carried_files(self.folder) if name not in apart and not is_own(name)),
            manifest=unrecorded(engine, Mesh(ranks), policy, records.values(), listed),
            warnings=tuple(self.warnings),
            beside=beside,
        )


def _role(name: str, layout: Layout, policy: Policy | None) -> Role:
    """The policy's own role where the cut is the policy's (a row layer's bias is whole by it); else what the cut comes
    to."""
    rule = policy.match(name) if policy else None
    axes = layout.cut_axes
    if not axes:
        return rule.role if rule is not None and rule.axis(layout.shape) is None else Role("replicate")
    if rule is not None and (rule.axis(layout.shape),) == axes:
        return rule.role
    is_row = axes == ((rule.axis_of("i", layout.shape) if rule else 1),)
    return Role("row", "", _key(rule)) if is_row else Role("column", "output", _key(rule))


def _key(rule: Rule | None) -> str:
    return rule.key if rule else ""
