"""What is to be verified, and how deep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tpshard.engines.opening import Source
from tpshard.launch import Launch

Level = Literal["files", "weights", "layout", "forward", "backward"]
LEVELS: tuple[Level, ...] = ("files", "weights", "layout", "forward", "backward")


@dataclass(frozen=True, slots=True)
class Request:
    """What to verify. ``level`` is the deepest check wanted; None: everything that can be run in reasonable time.
    ``factory`` is ``package.module:function`` for a model that transformers does not know; ``isolate`` lists every
    faulty layer rather than the first; ``device`` is where the model runs. ``launch``: this process's place among
    several, one for each rank, which wait for one another for ``timeout`` seconds. ``base``: an adapter's model.
    ``engine``: whose folder it is, where that is not recorded or not clear; ``config``: its config.json, where it has
    none."""

    folder: Path
    against: Path | None = None
    level: Level | None = None
    factory: str | None = None
    workers: int = 0
    progress: Callable[[int], object] = lambda count: None
    isolate: bool = False
    device: str = "cpu"
    launch: Launch | None = None
    timeout: float = 600.0
    base: Path | None = None
    engine: str | None = None
    config: Path | None = None

    @property
    def ranks(self) -> Source:
        """The folder of ranks' files."""
        return Source.given(self.folder, self.engine, self.config)

    @property
    def backward(self) -> bool | None:
        """Whether to go back; None where the model's size decides."""
        return {"forward": False, "backward": True}.get(self.level or "")

    @property
    def after_files(self) -> tuple[Level, ...]:
        """The levels that cannot be had where the files are not as they should be."""
        return tuple(level for level in LEVELS[1:] if self.wants(level))

    def wants(self, level: Level) -> bool:
        return LEVELS.index(level) <= LEVELS.index(self.level or "backward")
