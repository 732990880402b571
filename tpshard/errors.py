"""What can go wrong, as one class per thing the user can do about it.

Every error is one line: what, where, with the numbers, and (as ``hint``) the next step. The command line turns a
class into an exit code in one place; the library never exits.
"""

from __future__ import annotations

import unicodedata
from typing import ClassVar


class TpshardError(Exception):
    """The base of every error that tpshard raises on purpose.

    ``str(error)`` is the whole line, hint included:

    >>> str(UsageError("--tp must be at least 1, got 0", hint="use --tp 1 to copy"))
    '--tp must be at least 1, got 0 (use --tp 1 to copy)'
    """

    exit_code: ClassVar[int]
    kind: ClassVar[str]

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} ({hint})" if hint else message)


class UsageError(TpshardError):
    """The command or call asks for something that makes no sense: change the arguments."""

    exit_code = 2
    kind = "usage"


class PolicyError(TpshardError):
    """The policy is malformed, or does not fit the checkpoint at this number of ranks: change policy or ranks."""

    exit_code = 2
    kind = "policy"


class InputError(TpshardError):
    """The checkpoint, shard folder, manifest or config.json is not what it has to be: get a good one."""

    exit_code = 3
    kind = "input"


class InconclusiveError(TpshardError):
    """A check could not be carried out, so nothing is proven: install what is missing, or ask for less."""

    exit_code = 4
    kind = "inconclusive"


class StorageError(TpshardError):
    """Disk, memory or permissions: make room, or run again."""

    exit_code = 5
    kind = "storage"


def printable(text: str, limit: int = 200) -> str:
    r"""``text`` as it may be shown on a terminal: control and direction marks escaped, long names cut.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    >>> printable("x" * 300, limit=10)
    'xxxxxxxxxx... (300 characters)'
    """
    shown = "".join(
        ch if unicodedata.category(ch)[0] != "C" else ch.encode("unicode_escape").decode("ascii") for ch in text[:limit]
    )
    return shown if len(text) <= limit else f"{shown}... ({len(text)} characters)"
