"""Merging into the files that the tensors came in: what lay around them in each is put around them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpshard.containers import FRAME_KEY, INSIDE_KEY, Kept, read_frame
from tpshard.errors import InputError
from tpshard.folder import CONFIG
from tpshard.frames import Frame, Tensor
from tpshard.manifest import Manifest
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

    def targets(self, plan: Plan, outputs: Sequence[Output], frames: Sequence[Frame]) -> Iterator[Targets]:
        for start in frames[0].starts:
            yield Targets((start,))


def reframed(shards: Path, files: Mapping[str, Mapping[str, str]]) -> Reframed | None:
    """The arrangement of files with this metadata in the manifest; None where they are safetensors. Raises
    InputError, StorageError."""
    kept = {name: read_frame(shards / texts[FRAME_KEY]) for name, texts in files.items() if FRAME_KEY in texts}
    if kept and len(kept) != len(files):
        raise InputError(f"{shards}: some of the original files have a frame and some do not")
    return Reframed(kept) if kept else None


def made_by_split(manifest: Manifest, as_it_was: bool) -> set[str]:
    """Files of a shard folder that were in no folder before: what is kept of other files, and, where these are made
    again, a configuration that was in one."""
    made = {source.metadata[FRAME_KEY] for source in manifest.sources if FRAME_KEY in source.metadata}
    if as_it_was and any(INSIDE_KEY in source.metadata for source in manifest.sources):
        made.add(CONFIG)
    return made
