"""What the processes of one run say to each other: the first deals the work and commits, the others do their share.

No process needs another's bytes. The others tell which of their files are on the disk; the first tells how it ended,
so that all end alike. One that dies is noticed by its connection, and ends the run in all of them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpshard.errors import InconclusiveError, InputError, PolicyError, StorageError, TpshardError, UsageError
from tpshard.journal import Portion, difference
from tpshard.launch import Launch
from tpshard.manifest import FileRecord
from tpshard.meeting import Line, LostError, gather, join
from tpshard.share import Share
from tpshard.shares import Lot

STOPPING = 60.0  # seconds for the others to leave the files alone, after a failure
INTERRUPTED, INTERNAL = "interrupted", "internal"
KINDS = {error.kind: error for error in (UsageError, PolicyError, InputError, InconclusiveError, StorageError)}
CODES = {INTERRUPTED: 130, INTERNAL: 70}  # as the command line has them


class ToldError(Exception):
    """What ended this process is the first one's to say. ``exit_code``: of them all."""

    def __init__(self, why: Mapping[str, Any]) -> None:
        super().__init__(why["message"])
        self.exit_code: int = CODES[why["kind"]] if why["kind"] in CODES else KINDS[why["kind"]].exit_code


def _why(error: BaseException) -> dict[str, Any]:
    """An error as a word."""
    if isinstance(error, TpshardError):
        return {"kind": error.kind, "message": error.message, "hint": error.hint}
    if isinstance(error, KeyboardInterrupt):
        return {"kind": INTERRUPTED, "message": "was interrupted", "hint": None}
    return {"kind": INTERNAL, "message": f"{type(error).__name__}: {error}", "hint": None}


def _died(rank: int, host: str, size: int) -> StorageError:
    return StorageError(f"process {rank} of {size} (on {host}) has died", hint="start all of them again")


class Crew:
    """The others, as the first process has them; none where it is on its own. Use as a context manager: what ends it
    ends them."""

    def __init__(self, launch: Launch | None, path: Path, fingerprint: Mapping[str, str], timeout: float) -> None:
        self._changed = threading.Condition()
        self._done: set[int] = set()
        self._failure: BaseException | None = None
        self._ended = False
        self._lines: dict[int, Line] = {}
        self._listeners: list[threading.Thread] = []
        self.size = launch.size if launch else 1
        found = gather(launch, path, {"host": socket.gethostname()}, timeout) if launch else {}
        self._lines = {rank: line for rank, (line, _) in sorted(found.items())}
        self._prints = {rank: said["fingerprint"] for rank, (_, said) in sorted(found.items())}
        self._own = fingerprint

    def __enter__(self) -> Crew:
        return self

    def agree(self) -> None:
        """Raises UsageError where one of the others has planned something else."""
        for rank, theirs in self._prints.items():
            if other := difference(self._own, theirs):
                what = f"process {rank} of {self.size} (on {self._lines[rank].host}) has {other} than the first"
                raise UsageError(what, hint="all need the same command and the same files")

    def checked(
        self, lots: Sequence[Sequence[FileRecord]], check: Callable[[Sequence[FileRecord]], set[str]]
    ) -> set[str]:
        """The files that are as recorded, a lot of them looked at by each process."""
        for rank, line in self._lines.items():
            self._say(line, {"check": [[file.name, file.size, file.digest] for file in lots[rank]]})
        sound = check(lots[0])
        for line in self._lines.values():
            sound |= set(self._hear(line)["sound"])
        return sound

    def start(self, lots: Sequence[Lot], record: Callable[[Portion], None]) -> None:
        """Give the others their shares; ``record`` is called with each portion of theirs."""
        for rank, line in self._lines.items():
            outputs, wholes = lots[rank]
            self._say(line, {"share": {"outputs": sorted(outputs), "wholes": sorted(wholes)}})
        for line in self._lines.values():
            listener = threading.Thread(target=self._listen, args=(line, record), daemon=True)
            self._listeners.append(listener)
            listener.start()

    def check(self) -> None:
        """Raises what ended one of the others."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until all others are done. Raises what ended one of them."""
        with self._changed:
            while self._failure is None and len(self._done) < len(self._lines):
                self._changed.wait()
        self.check()

    def committed(self) -> None:
        """All is well; the others may go."""
        self._ended = True
        for line in self._lines.values():
            with contextlib.suppress(LostError):
                line.say({"committed": True})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        self._ended = True
        for line in self._lines.values():
            with contextlib.suppress(LostError):
                line.say({"stop": _why(error)})
        end = time.monotonic() + STOPPING
        for listener in self._listeners:
            listener.join(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """The others wait for that after a failure, so that the first can speak before they end."""
        for line in self._lines.values():
            line.close()

    def _listen(self, line: Line, record: Callable[[Portion], None]) -> None:
        try:
            while True:
                word = line.hear()
                if "portion" in word:
                    record(Portion.of(word["portion"]))
                elif "failed" in word:
                    self._fail(_error_of(word["failed"], line, self.size))
                elif "stopped" in word:
                    return
                else:
                    with self._changed:
                        self._done.add(line.rank)
                        self._changed.notify_all()
        except LostError:
            self._fail(_died(line.rank, line.host, self.size))
        except TpshardError as error:  # of the journal
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if not self._ended:
                self._failure = self._failure or error
            self._changed.notify_all()

    def _say(self, line: Line, word: Mapping[str, Any]) -> None:
        try:
            line.say(word)
        except LostError:
            raise _died(line.rank, line.host, self.size) from None

    def _hear(self, line: Line) -> dict[str, Any]:
        try:
            word = line.hear()
        except LostError:
            raise _died(line.rank, line.host, self.size) from None
        if "failed" in word:
            raise _error_of(word["failed"], line, self.size)
        return word


def _error_of(why: Mapping[str, Any], line: Line, size: int) -> BaseException:
    message = f"process {line.rank} of {size} (on {line.host}): {why['message']}"
    if why["kind"] in KINDS:
        return KINDS[why["kind"]](message, hint=why["hint"])
    return (
        StorageError(message, hint="start all of them again") if why["kind"] == INTERRUPTED else RuntimeError(message)
    )


class Member:
    """One of the others. Use as a context manager; raises ToldError where the first process says what has happened."""

    def __init__(self, launch: Launch, path: Path, fingerprint: Mapping[str, str], timeout: float) -> None:
        self._size = launch.size
        self._line, said = join(launch, path, {"fingerprint": dict(fingerprint)}, timeout)
        self._first = str(said["host"])
        self._changed = threading.Condition()
        self._asked: deque[dict[str, Any]] = deque()
        self._end: BaseException | None = None
        self._committed = self._gone = False
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Member:
        return self

    def share(self, check: Callable[[Sequence[FileRecord]], set[str]]) -> Share:
        """This process's share; before that it looks at finished files where it is asked to."""
        while "share" not in (word := self._wait(lambda: bool(self._asked))):
            lot = [FileRecord(name, 0, 0, size, digest) for name, size, digest in word["check"]]
            self._say({"sound": sorted(check(lot))})
        return Share(frozenset(word["share"]["outputs"]), frozenset(word["share"]["wholes"]))

    def record(self, portion: Portion) -> None:
        """Tell that these files are on the disk."""
        self._say({"portion": portion.as_data()})

    def check(self) -> None:
        """Raises what ended the run."""
        if self._end is not None:
            raise self._end

    def finish(self) -> None:
        """Tell that all is done, and wait until the first process has committed it."""
        self._say({"done": True})
        self._wait(lambda: self._committed)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None or (error is self._end and not isinstance(error, ToldError)):
                return
            with contextlib.suppress(LostError):
                if not isinstance(error, ToldError):
                    self._line.say({"failed": _why(error)})
                self._line.say({"stopped": True})
                with self._changed:
                    self._changed.wait_for(lambda: self._gone, STOPPING)
            if isinstance(self._end, ToldError) and not isinstance(error, ToldError):
                raise ToldError(_why(error)) from None
        finally:
            self._line.close()

    def _listen(self) -> None:
        while not self._gone:
            try:
                word = self._line.hear()
            except LostError:
                word = {"gone": True}
            with self._changed:
                if "committed" in word:
                    self._committed = True
                elif "stop" in word:
                    self._end = ToldError(word["stop"])
                elif "gone" in word:
                    self._gone = True
                    if not self._committed:
                        self._end = self._end or _died(0, self._first, self._size)
                else:
                    self._asked.append(word)
                self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> dict[str, Any]:
        """Until then. Raises what ended the run."""
        with self._changed:
            while not ready():
                self.check()
                self._changed.wait()
            return self._asked.popleft() if self._asked else {}

    def _say(self, word: Mapping[str, Any]) -> None:
        try:
            self._line.say(word)
        except LostError:
            self._wait(lambda: False)
