"""What one run does of a plan, and what it has written: all of it, or what is left to it by others."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from tpshard.manifest import FileRecord


@dataclass(frozen=True, slots=True)
class Share:
    """What one run does of a plan: the output files it writes, by name, and the items, by index, of which it takes the
    whole's digest (which needs the whole tensor to be read)."""

    outputs: Container[str]
    wholes: Container[int]


@dataclass(frozen=True, slots=True)
class Written:
    """What a run wrote: a record for each output, and each item's digests (whole, empty where it was not this run's to
    take; and of each rank's own tensor, None where that is the whole, nothing, or not written by this run)."""

    files: tuple[FileRecord, ...]
    digests: tuple[str, ...]
    shards: tuple[tuple[str | None, ...], ...]

    def joined(self, other: Written) -> Written:
        """What two runs wrote, each its share of one plan."""
        return Written(
            (*self.files, *other.files),
            tuple(a or b for a, b in zip(self.digests, other.digests, strict=True)),
            tuple(_either(a, b) for a, b in zip(self.shards, other.shards, strict=True)),
        )


def _either(one: tuple[str | None, ...], other: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(a or b for a, b in zip(one, other, strict=True)) if one and other else one or other
