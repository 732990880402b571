"""What is asked of a reader, and what is known of one without asking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Asked:
    """A folder to be opened. ``config``: the model's config.json where the folder has none; ``policy``: by which roles
    are told, and cuts that no file tells."""

    folder: Path
    config: Mapping[str, Any] | None = None
    policy: str = "auto"


@dataclass(frozen=True, slots=True)
class Reader:
    """``files``: what the weight files are called; ``open`` raises InputError, or PolicyError where the policy does
    not fit. ``whole``: whether the folder is a full checkpoint, which can be split; ``own_cuts``: whether ranks' parts
    are of sizes that only the engine's own code tells; ``by_header``: whether files are recognised by what is in them,
    so that those of the same names that are not Hugging Face's are told apart; ``written_as``: what ``--engine`` takes
    to write such folders."""

    name: str
    title: str
    files: str
    description: str
    recognises: Callable[[Path], bool]
    open: Callable[[Asked], Checkpoint]
    whole: bool = False
    own_cuts: bool = False
    by_header: bool = False
    written_as: tuple[str, ...] = ()
