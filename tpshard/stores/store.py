"""What is asked of a store, and which library answers for which scheme.

Nothing of a library is imported before a path of its scheme is used.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from tpshard.errors import UsageError, printable

MOST_LISTED = 100_000  # objects below one folder: bounds time and memory where a whole bucket is given by mistake
PART = 8 * 2**20  # of an object that is written in parts, bytes
MOST_PARTS = 9_000  # S3 takes 10,000 of one object


@dataclass(frozen=True, slots=True)
class Known:
    """What a store says of an object; ``version`` changes with its bytes."""

    size: int
    version: str


class Writer(Protocol):
    """An object being written front to back. It is not there before ``finish``."""

    def write(self, data: memoryview | bytes) -> None: ...

    def finish(self) -> None: ...

    def abort(self) -> None: ...


class Store(Protocol):
    """A bucket or container. Each method raises the library's own errors, which ``failures`` puts into words."""

    def list(self, prefix: str) -> Mapping[str, Known]:
        """All objects below a prefix, which ends at a whole name, and the object of that name, by key."""

    def read(self, key: str, offset: int, into: memoryview, version: str) -> int:
        """Fill ``into``; how many bytes came. Refuses an object of another version where the store can tell."""

    def create(self, key: str, data: bytes) -> bool:
        """A new object; False where there is one."""

    def writer(self, key: str, size: int, at_once: int) -> Writer:
        """``size``: of the object when it is complete; ``at_once``: parts on their way at the same time."""

    def delete(self, key: str) -> None: ...


SCHEMES: Mapping[str, tuple[str, str]] = {  # the module that answers, and what installs its library
    "s3": ("tpshard.stores.objects", "tpshard[s3]"),
    "az": ("tpshard.stores.objects", "tpshard[azure]"),
    "gs": ("tpshard.stores.filesystems", "tpshard[gcs]"),
    "hf": ("tpshard.stores.filesystems", "tpshard[hub]"),
}
_opened: dict[tuple[str, str], Store] = {}
_opening = threading.Lock()


def store_of(scheme: str, bucket: str) -> Store:
    """The store of a scheme and a bucket (empty for ``hf``); opened once."""
    with _opening:
        if (scheme, bucket) not in _opened:
            module, extra = SCHEMES[scheme]
            try:
                opened = importlib.import_module(module).open_store(scheme, bucket)
            except ImportError as error:
                what = f"{scheme}://{printable(bucket)}: needs the package {error.name}, which is not installed"
                raise UsageError(what, hint=f"pip install '{extra}'") from None
            _opened[scheme, bucket] = cast(Store, opened)
        return _opened[scheme, bucket]


def part_size(size: int) -> int:
    """Bytes of each part of an object of ``size`` bytes.

    >>> part_size(5 * 10**9) == PART, part_size(10**12) > 10**12 // 10_000
    (True, True)
    """
    return max(PART, -(-size // MOST_PARTS))
