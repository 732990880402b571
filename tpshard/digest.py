"""Digests by name. XXH3-128 is the default: it costs almost nothing beside the copy (tens of GB/s)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import xxhash

from tpshard.errors import UsageError

ALGORITHMS = ("xxh3-128", "blake3", "sha256")


class Hasher(Protocol):
    def update(self, data: memoryview | bytes, /) -> object: ...
    def hexdigest(self) -> str: ...


def hasher_factory(algorithm: str) -> Callable[[], Hasher]:
    """A function that makes hashers. Raises UsageError where the algorithm is unknown or not installed."""
    match algorithm:
        case "xxh3-128":
            return xxhash.xxh3_128
        case "sha256":
            return hashlib.sha256
        case "blake3":
            try:
                import blake3
            except ImportError:
                raise UsageError("blake3 is not installed", hint="pip install 'tpshard[blake3]'") from None
            return blake3.blake3
        case _:
            raise UsageError(f"digest '{algorithm}' is unknown, known: {', '.join(ALGORITHMS)}")
