"""Merging into the files that the tensors came in: what lay around them in each is put around them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpshard.containers import INSIDE_KEY, Kept, read_frame
from tpshard.digest import hasher_factory
from tpshard.errors import InputError, printable
from tpshard.folder import CONFIG, read_bytes
from tpshard.frames import Frame, Tensor
from tpshard.manifest import FRAME_KEY, Manifest
from tpshard.plan import Output, Plan, Targets


@dataclass(frozen=True, slots=True)
class Reframed:
    """Files of whole tensors, each where it was. ``kept``: of each file, by its name, what is not tensors."""

    kept: Mapping[str, Kept]
    in_order: bool = False

    def frame(self, plan: Plan, output: Output) -> Frame:
        items = plan.items[output.first : output.last]
        held = [Tensor(item.stored.name, item.stored.dtype, item.want.shape) for item in items]
        return self.kept[output.name].frame(held, {})

    def targets(self, plan: Plan, outputs: Sequence[Output], frames: Sequence[Frame | None]) -> Iterator[Targets]:
        for start in frames[0].starts if frames[0] else ():
            yield Targets((start,))


def reframed(shards: Path, manifest: Manifest, files: Mapping[str, Mapping[str, str]]) -> Reframed | None:
    """The arrangement of files with this metadata in the manifest; None where they are safetensors. Raises
    InputError, StorageError."""
    wanted = {name: texts[FRAME_KEY] for name, texts in files.items() if FRAME_KEY in texts}
    if wanted and len(wanted) != len(files):
        raise InputError(f"{shards}: some of the original files have a frame and some do not")
    return Reframed({name: _kept(shards, manifest, frame) for name, frame in wanted.items()}) if wanted else None


def _kept(shards: Path, manifest: Manifest, frame: str) -> Kept:
    """A frame file, which has to be the one that was written. Raises InputError, StorageError."""
    record = next((record for record in manifest.carried if record.name == frame), None)
    if record is None:
        raise InputError(f"{shards}: the manifest does not list {printable(frame)}, which it speaks of")
    path = shards / frame
    kept = read_frame(path)
    hasher = hasher_factory(manifest.algorithm)()
    hasher.update(read_bytes(path))
    if hasher.hexdigest() != record.digest:
        raise InputError(f"{path}: was changed since the shards were written", hint="tpshard verify tells more")
    return kept


def made_by_split(manifest: Manifest, as_it_was: bool) -> set[str]:
    """Files of a shard folder that were in no folder before: what is kept of other files, and, where these are made
    again, a configuration that was in one."""
    made = {source.metadata[FRAME_KEY] for source in manifest.sources if FRAME_KEY in source.metadata}
    if as_it_was and any(INSIDE_KEY in source.metadata for source in manifest.sources):
        made.add(CONFIG)
    return made
