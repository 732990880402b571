"""The output promise: after any failure the target is as it was, nothing is left behind, and the next run works."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.build import POLICY, tiny_checkpoint, tree
from tpshard.conversion import Conversion, Options, run
from tpshard.convert import plan_merge, plan_split
from tpshard.errors import StorageError, UsageError
from tpshard.journal import OTHER, Head
from tpshard.staging import Staging, check_space

RANKS = 3


@pytest.fixture
def conversion(source: Path, policy: str, tmp_path: Path) -> Conversion:
    return plan_split(source, tmp_path / "shards", RANKS, policy)


def staging_of(target: Path, *files: str) -> Staging:
    return Staging(target, Head(dict.fromkeys(OTHER, ""), files))


def failing(call: Callable[..., Any], at: int, error: int) -> tuple[Callable[..., Any], list[int]]:
    """A system call that fails the ``at``-th time (from 0), and the count of its calls."""
    calls = [0]

    def counted(*words: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at + 1:
            raise OSError(error, os.strerror(error))
        return call(*words, **options)

    return counted, calls


CALLS = [("pwritev", errno.ENOSPC), ("pwritev", errno.EIO), ("fsync", errno.EIO), ("mkdir", errno.EDQUOT),
         ("rename", errno.EACCES), ("preadv", errno.EIO), ("ftruncate", errno.EFBIG)]  # fmt: skip


@pytest.mark.parametrize(("name", "error"), CALLS, ids=[f"{name}-{errno.errorcode[error]}" for name, error in CALLS])
def test_every_call_may_fail(
    name: str, error: int, conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, the second, … until a run gets through. All other folders and files stay as they are."""
    before, at = tree(tmp_path), 0
    original = getattr(os, name)
    while True:
        counted, calls = failing(original, at, error)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, counted)
            try:
                run(conversion)
            except StorageError as failure:
                assert os.strerror(error) in str(failure)
                assert "\n" not in str(failure)
            else:
                break
        committed = (tmp_path / "shards").exists()
        if committed:  # only the parent folder's own fsync comes after the rename
            assert (name, calls[0]) == ("fsync", at + 1)
            conversion = plan_merge(tmp_path / "shards", tmp_path / "merged")
            run(conversion)
            return
        assert tree(tmp_path) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tiny.yaml"]
        at += 1
    assert calls[0] == at
    assert at > 0


def test_short_reads_and_writes(source: Path, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take or give less than was asked for."""
    whole = plan_split(source, tmp_path / "whole", RANKS, policy)
    run(whole)
    write, read = os.pwritev, os.preadv

    def less_written(fd: int, pieces: list[Any], offset: int) -> int:
        return write(fd, [memoryview(pieces[0])[: max(1, len(pieces[0]) // 3)]], offset)

    def less_read(fd: int, rooms: list[Any], offset: int) -> int:
        return read(fd, [memoryview(rooms[0])[: max(1, len(rooms[0]) // 2)]], offset)

    monkeypatch.setattr(os, "pwritev", less_written)
    monkeypatch.setattr(os, "preadv", less_read)
    run(plan_split(source, tmp_path / "parts", RANKS, policy))
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_two_writers_for_one_target(conversion: Conversion, tmp_path: Path) -> None:
    """The one that comes second is told, and takes nothing away."""
    with staging_of(tmp_path / "shards", "a") as slow:
        slow.write("a", b"a")
        for resume in (False, True):
            with pytest.raises(UsageError, match="shards: another run is writing it"):
                run(conversion, Options(resume=resume))
        slow.commit()
    assert tree(tmp_path / "shards") == {"a": b"a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "source", "tiny.yaml"]


def test_a_target_that_came_into_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="came into use while this ran"), staging_of(tmp_path / "x", "a") as staging:
        staging.write("a", b"a")
        (tmp_path / "x").mkdir()
        (tmp_path / "x/theirs").write_text("theirs")
        staging.commit()
    assert tree(tmp_path) == {"x/theirs": b"theirs"}


def test_an_empty_target_is_taken(conversion: Conversion, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    run(conversion)
    assert (tmp_path / "shards/tpshard.json").is_file()


def test_what_lies_in_the_staging_folder_of_others_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), staging_of(tmp_path / "x", "mine") as staging:
        staging.write("mine", b"")
        (staging.folder / "theirs").write_text("")
        raise RuntimeError("stop")
    assert (staging.folder / "theirs").exists()
    assert not (staging.folder / "mine").exists()
    with pytest.raises(UsageError, match="theirs: is not from tpshard"), staging_of(tmp_path / "x", "mine"):
        pass
    assert (staging.folder / "theirs").exists()
    (staging.folder / "theirs").unlink()
    with staging_of(tmp_path / "x", "mine") as staging:
        staging.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        staging = staging_of(tmp_path / "x", "a", "in/b").__enter__()
        staging.write("a", b"half")
        staging.write("in/b", b"half")
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2  # the folder and its journal
    with staging_of(tmp_path / "x", "a") as staging:
        staging.write("a", b"new")
        staging.commit()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["x", "x/a"]


def test_a_file_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File exists"), staging_of(tmp_path / "x", "a") as staging:
        staging.write("a", b"1")
        staging.write("a", b"2")
    assert not list(tmp_path.iterdir())


def test_space_is_asked_for_first(conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "x", 10**6)
    with pytest.raises(StorageError, match=r"\d+ bytes are needed, \d+ are free \(make room\)"):
        check_space(tmp_path / "x", 2**60)
    monkeypatch.setattr("tpshard.staging.MARGIN", 2**60)
    with pytest.raises(StorageError, match="bytes are needed"):
        run(conversion)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tiny.yaml"]


# ---------------------------------------------------------------------------------------------- signals

SCRIPT = """
import os, signal, sys
from pathlib import Path
from tpshard.cli import main, render

class Stop:
    "A progress bar that sends a signal to its own process at the n-th batch."
    def __init__(self, *_): self.left = at
    def __enter__(self): return self.update
    def __exit__(self, *_): pass
    def update(self, count):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), number)

number, at = int(sys.argv.pop()), int(sys.argv.pop())
# Whoever runs the tests may have these ignored (nohup, a job in the background).
if number != signal.SIGKILL:
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
import tpshard.execute
tpshard.execute.SLAB = 20_000
render.progress = Stop
main.main()
"""


def signalled(folder: Path, number: signal.Signals, at: int, workers: int) -> subprocess.CompletedProcess[str]:
    words = ["split", "source", "shards", "--tp", str(RANKS), "--policy", "tiny.yaml", "--workers", str(workers)]
    command = [sys.executable, "-c", SCRIPT, *words, str(at), str(int(number))]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted(number: signal.Signals, at: int, workers: int, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "source")
    (tmp_path / "tiny.yaml").write_text(POLICY)
    before = tree(tmp_path)
    done = signalled(tmp_path, number, at, workers)
    assert done.returncode == 130
    assert done.stderr.strip() == "tpshard: interrupted; nothing was left behind"
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tiny.yaml"]


def test_killed(tmp_path: Path) -> None:
    """Nothing can clean up then: the hidden staging folder stays, the target is absent, and the next run, another one
    here, replaces it."""
    tiny_checkpoint(tmp_path / "source")
    (tmp_path / "tiny.yaml").write_text(POLICY)
    done = signalled(tmp_path, signal.SIGKILL, 7, 2)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "shards").exists()
    left, journal = sorted(path for path in tmp_path.iterdir() if path.name.startswith(".shards.tpshard-"))
    assert journal.name == f"{left.name}.journal"
    assert not (left / "tpshard.json").exists()
    run(plan_split(tmp_path / "source", tmp_path / "shards", 1, str(tmp_path / "tiny.yaml")))
    run(plan_split(tmp_path / "source", tmp_path / "other", 1, str(tmp_path / "tiny.yaml")))
    assert tree(tmp_path / "shards") == tree(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "shards", "source", "tiny.yaml"]
