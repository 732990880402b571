"""A plan carried out by one process or several, from the start or from where a run before it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tpshard.crew import Crew, Member
from tpshard.errors import InputError, StorageError
from tpshard.execute import Progress, execute
from tpshard.file_digest import file_digest
from tpshard.journal import Head, Portion
from tpshard.launch import Launch
from tpshard.manifest import FileRecord
from tpshard.plan import Plan
from tpshard.share import Share, Written
from tpshard.shares import Collector, deal, joined, usable
from tpshard.staging import ADDRESS, Shared, Staging


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be written, and how. ``launch``: this process's place among several."""

    plan: Plan
    head: Head
    algorithm: str
    threads: int
    progress: Progress
    launch: Launch | None = None
    timeout: float = 600.0


class Lead:
    """The only process, or the first of several: it owns the staging folder. ``kept``: what a run before has done;
    ``copied``: when all was written, though perhaps not on the disk yet."""

    def __init__(self, task: Task, staging: Staging, crew: Crew) -> None:
        self._task, self._staging, self._crew = task, staging, crew
        crew.agree()
        self.copied = 0.0
        self.kept: Sequence[Portion] = self._sound()
        staging.keep(self.kept)

    def write(self) -> Written:
        """Have all files written and on the disk."""
        task, crew = self._task, self._crew
        lots, done = deal(task.plan, self.kept, crew.size), list(self.kept)

        def record(portion: Portion) -> None:
            self._staging.record(portion)
            done.append(portion)

        crew.start(lots, record)
        with _carried_out(task, Share(*lots[0]), self._staging, record, crew.check):
            self.copied = time.monotonic()
        if crew.size > 1:
            crew.wait()
            self.copied = time.monotonic()
        return joined(task.plan, done)

    def _sound(self) -> list[Portion]:
        """What is recorded, and whose files still have their digests."""
        portions = self._staging.portions
        if not portions:
            return []
        records = sorted({file for portion in portions for file in portion.files}, key=lambda file: -file.size)
        lots = [records[number :: self._crew.size] for number in range(self._crew.size)]
        names = self._crew.checked(lots, lambda lot: _intact(self._task, self._staging, lot))
        return usable(self._task.plan, portions, lambda file: file.name in names)


@contextlib.contextmanager
def leading(task: Task, staging: Staging) -> Iterator[Lead]:
    """The staging folder, and the other processes; when this ends well, they are told that all is committed."""
    with contextlib.ExitStack() as last, staging:
        crew = Crew(task.launch, staging.beside(ADDRESS), task.head.fingerprint, task.timeout)
        last.callback(crew.close)
        with crew:
            yield Lead(task, staging, crew)
            crew.committed()


def take_part(task: Task, target: Path) -> Written:
    """Another process than the first: its share of the files. Raises ToldError where the first tells what happened."""
    assert task.launch is not None
    staging = Shared(target, task.head.files)
    done: list[Portion] = []
    with Member(task.launch, staging.beside(ADDRESS), task.head.fingerprint, task.timeout) as member:
        share = member.share(lambda lot: _intact(task, staging, lot))
        if not staging.folder.is_dir():
            what = f"{staging.folder}: the first process has made it, and it is not here"
            raise StorageError(what, hint="all processes have to write to one shared file system")

        def record(portion: Portion) -> None:
            member.record(portion)
            done.append(portion)

        with _carried_out(task, share, staging, record, member.check):
            pass
        member.finish()
    return joined(task.plan, done)


@contextlib.contextmanager
def _carried_out(
    task: Task, share: Share, staging: Shared, record: Callable[[Portion], None], check: Callable[[], None]
) -> Iterator[None]:
    """Write a share, and at the end have it on the disk. ``record`` is called with each portion that is there, while
    others are being written, and ``check`` between batches, to raise what ends the run."""
    collector, pending = Collector(task.plan, share), list[Future[None]]()

    def keep(portion: Portion) -> None:
        staging.sync_files(file.name for file in portion.files)
        record(portion)

    def finished(file: FileRecord, digests: Sequence[str], shards: Sequence[tuple[str | None, ...]]) -> None:
        portion = collector.add(file, digests, shards)
        if portion is not None:
            pending.append(pool.submit(keep, portion))

    def progress(count: int) -> None:
        check()
        for future in pending:
            if future.done():
                future.result()
        task.progress(count)

    with ThreadPoolExecutor(1) as pool:
        try:
            execute(task.plan, staging, task.algorithm, task.threads, progress, share, finished)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        yield
        for future in pending:
            future.result()


def _intact(task: Task, staging: Shared, lot: Sequence[FileRecord]) -> set[str]:
    """The names of those files that have their recorded size and digest."""

    def is_intact(file: FileRecord) -> bool:
        path = staging.folder / file.name
        try:
            return path.stat().st_size == file.size and file_digest(path, task.algorithm, True) == file.digest
        except (OSError, InputError, StorageError):
            return False

    with ThreadPoolExecutor(task.threads) as pool:
        found = pool.map(is_intact, lot)
        return {file.name for file, intact in zip(lot, found, strict=True) if intact}
