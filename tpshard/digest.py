"""Digests by name. XXH3-128 is the default: it costs almost nothing beside the copy (tens of GB/s)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

import xxhash

from tpshard.errors import UsageError

ALGORITHMS = ("xxh3-128", "blake3", "sha256")
TENSORS = "xxh3-128"  # of tensors, whatever their files have: it finds faults, the files' digest forgeries
TREE = "xxh3-128-tree"  # of a safetensors file: over the digests of its header and of its tensors, see tree_digest
RECORDED = (*ALGORITHMS, TREE)
ZEROS = memoryview(bytes(2**16))


class Hasher(Protocol):
    def update(self, data: memoryview | bytes, /) -> object: ...
    def hexdigest(self) -> str: ...


def update(hasher: Hasher, zeros: int, data: memoryview | bytes) -> None:
    """Take so many zeros, then the data."""
    if not zeros:  # most often: range() would cost as much again
        hasher.update(data)
        return
    for done in range(0, zeros, len(ZEROS)):
        hasher.update(ZEROS[: zeros - done])
    hasher.update(data)


def tree_digest(head: bytes, tensors: Iterable[str]) -> str:
    """A file's digest from its head (length and header) and the digests of its tensors, in the file's order, without
    reading these again: XXH3-128 over the digests, 16 bytes each."""
    hasher = xxhash.xxh3_128(xxhash.xxh3_128(head).digest())
    for digest in tensors:
        hasher.update(bytes.fromhex(digest))
    return str(hasher.hexdigest())


def hasher_factory(algorithm: str) -> Callable[[], Hasher]:
    """A function that makes hashers. Raises UsageError where the algorithm is unknown or not installed."""
    match algorithm:
        case "xxh3-128" | "xxh3-128-tree":
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
