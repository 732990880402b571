"""What was interrupted goes on: the result is that of a run that was not, whatever moment the other died at."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.build import POLICY, tiny_checkpoint, tree
from tpshard import api
from tpshard.conversion import Options, run
from tpshard.convert import plan_merge, plan_reshard, plan_split
from tpshard.demo import make_checkpoint
from tpshard.errors import StorageError, UsageError
from tpshard.journal import Portion
from tpshard.manifest import FileRecord
from tpshard.staging import Staging

PARTS = {"max_shard_size": 40_000}  # four parts of three files
CALLS = ("fsync", "pwritev", "write", "mkdir", "rename", "unlink")

# One process forks a child for each moment: it dies there, another goes on; and a third begins again.
DYING = """
import os, shutil, signal, sys
from pathlib import Path
from tests.build import tree
from tests.test_resume import planned
from tpshard.conversion import Options, run

name, command, folder, resumes = sys.argv[1], sys.argv[2], Path(sys.argv[3]), [True, False][: int(sys.argv[4])]
original = getattr(os, name)

def forked(step):
    child = os.fork()
    if child == 0:
        try:
            step()
        except BaseException as error:
            print(name, at, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def dying():
    left = [at]
    def counted(*words, **options):
        left[0] -= 1
        if left[0] == 0:
            if name in ("write", "pwritev"):  # half of it gets through
                data = words[1] if name == "write" else words[1][0]
                half = memoryview(data)[: len(data) // 2]
                original(words[0], half if name == "write" else [half], *words[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*words, **options)
    setattr(os, name, counted)
    run(*planned(command, folder, False))

wanted, target, at, told = tree(folder / "wanted"), folder / "target", 0, 0
while True:
    at += 1
    for resume in resumes:
        before = {path.name for path in folder.iterdir()}
        died = os.waitstatus_to_exitcode(forked(dying))
        if not target.exists():
            assert died == -signal.SIGKILL, died
            assert forked(lambda: run(*planned(command, folder, resume))) == 0, (name, at, resume)
        assert tree(target) == wanted, (name, at, resume)
        shutil.rmtree(target)
        for path in {path.name for path in folder.iterdir()} - before:
            assert path.endswith(".journal"), path  # of one that died right after the rename
            (folder / path).unlink()
    if died == 0:
        break
print(at - 1)
"""


def planned(command: str, folder: Path, resume: bool, target: str = "target") -> tuple[Any, Options]:
    options = Options(**PARTS, resume=resume, workers=1)
    where, policy = folder / target, str(folder / "tiny.yaml")
    if command == "split":
        return plan_split(folder / "source", where, 3, policy, options), options
    if command == "merge":
        return plan_merge(folder / "shards", where, options), options
    return plan_reshard(folder / "shards", where, 1, None, options), options


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "source", files=2)
    (tmp_path / "tiny.yaml").write_text(POLICY)
    run(plan_split(tmp_path / "source", tmp_path / "shards", 3, str(tmp_path / "tiny.yaml")))
    return tmp_path


def killed_at_every_call(name: str, command: str, folder: Path, ways: int) -> None:
    run(*planned(command, folder, False, "wanted"))
    words = [sys.executable, "-c", DYING, name, command, str(folder), str(ways)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 0


def test_killed_at_every_fsync(folder: Path) -> None:
    killed_at_every_call("fsync", "split", folder, 1)


@pytest.mark.sweep
@pytest.mark.parametrize("command", ["split", "merge", "reshard"])
@pytest.mark.parametrize("name", CALLS)
def test_killed_at_every_call(name: str, command: str, folder: Path) -> None:
    """With --resume afterwards, and without."""
    killed_at_every_call(name, command, folder, 2)


def stopped(folder: Path, command: str = "split", at: int = 5, **options: Any) -> None:
    """A run that ends at its ``at``-th portion, and keeps what it has."""
    left = [at]

    def stopping(self: Any, portion: Portion) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise StorageError("the disk is gone", hint="find it")
        original(self, portion)

    original = Staging.record
    Staging.record = stopping  # type: ignore[method-assign]
    conversion, given = planned(command, folder, True)
    try:
        with pytest.raises(StorageError) as caught:
            run(conversion, given)
    finally:
        Staging.record = original  # type: ignore[method-assign]
    assert caught.value.message == "the disk is gone"
    assert caught.value.hint == "find it; what is finished was kept: run again with --resume"


@pytest.fixture
def left(folder: Path) -> Path:
    """The staging folder of a run that was stopped when two of four parts were on the disk."""
    stopped(folder, at=3)
    assert not (folder / "target").exists()
    (found,) = folder.glob(".target.tpshard-????????")
    return found


def test_what_is_finished_is_not_written_again(folder: Path, left: Path) -> None:
    before = {path.name: path.stat() for path in left.iterdir()}
    done = run(*planned("split", folder, True))
    assert done.resumed == 6
    after = {path.name: path.stat() for path in (folder / "target").iterdir()}
    same = [
        name
        for name in before
        if (before[name].st_ino, before[name].st_mtime_ns) == (after[name].st_ino, after[name].st_mtime_ns)
    ]
    assert len(same) == 6
    run(*planned("split", folder, False, "wanted"))
    assert tree(folder / "target") == tree(folder / "wanted")
    assert not list(folder.glob(".target*"))


def test_a_finished_file_that_was_damaged_is_written_again(folder: Path, left: Path) -> None:
    names = sorted(path.name for path in left.glob("*part-00001*"))
    assert len(names) == 3
    (left / names[0]).unlink()
    with (left / names[1]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    done = run(*planned("split", folder, True))
    assert done.resumed == 3
    run(*planned("split", folder, False, "wanted"))
    assert tree(folder / "target") == tree(folder / "wanted")


def test_another_run_does_not_go_on(folder: Path, left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)
    conversion, options = planned("split", folder, True)
    target, policy = folder / "target", folder / "tiny.yaml"

    def refused(said: str, **changes: Any) -> None:
        given = {"source": folder / "source", "ranks": 3, "policy": str(policy), **changes}
        with pytest.raises(UsageError) as caught:
            run(plan_split(given["source"], target, given["ranks"], given["policy"], options), options)
        assert caught.value.message == f"{target}: the run to go on with had {said}"
        assert caught.value.hint == "leave out --resume to begin again"

    refused("other ranks", ranks=1)
    other = folder / "other.yaml"
    other.write_text(POLICY.replace("mlp.down_proj: row", "mlp.down_proj: {rule: row, uneven: true}"))
    refused("another policy", policy=str(other))
    other.unlink()
    weights = folder / "source/model-00001-of-00002.safetensors"
    found = weights.stat()
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    refused("another source")
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    monkeypatch.setattr("tpshard.fingerprint.__version__", "99")
    refused("another version of tpshard")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="had another digest"):
        run(conversion, Options(**PARTS, resume=True, digest="sha256"))
    with pytest.raises(UsageError, match="had another set of files"):
        run(plan_split(folder / "source", target, 3, str(policy)), Options(resume=True))
    assert tree(folder) == before
    assert run(conversion, options).resumed == 6


def test_another_run_without_resume_begins_again(folder: Path, left: Path) -> None:
    (left / "model.safetensors.index.json").write_text("half")
    run(plan_split(folder / "source", folder / "target", 1, str(folder / "tiny.yaml")))
    run(plan_split(folder / "source", folder / "wanted", 1, str(folder / "tiny.yaml")))
    assert tree(folder / "target") == tree(folder / "wanted")
    assert not list(folder.glob(".target*"))


def test_strangers_files_are_left_alone(folder: Path, left: Path) -> None:
    (left / "notes.txt").write_text("mine")
    before = tree(folder)
    for resume in (True, False):
        with pytest.raises(UsageError, match=r"notes.txt: is not from tpshard \(move it away"):
            run(*planned("split", folder, resume))
    assert tree(folder) == before


@pytest.mark.parametrize("missing", [1, 5])
def test_a_torn_journal_is_read_as_far_as_it_goes(missing: int, folder: Path, left: Path) -> None:
    journal = left.with_name(f"{left.name}.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:-missing])
    stopped(folder, at=2)
    assert run(*planned("split", folder, True)).resumed == 6
    run(*planned("split", folder, False, "wanted"))
    assert tree(folder / "target") == tree(folder / "wanted")


def test_files_are_on_the_disk_before_the_journal_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    fsync, record = os.fsync, Staging.record

    def syncing(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        fsync(fd)

    def recording(self: Staging, portion: Portion) -> None:
        assert {(self.folder / file.name).stat().st_ino for file in portion.files} <= synced
        record(self, portion)
        assert self.beside("journal").stat().st_ino in synced
        synced.clear()

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Staging, "record", recording)
    run(*planned("split", folder, False))


def test_a_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is possible; what is there may be another's, so that nobody takes it over unasked."""

    def refusing(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    run(*planned("split", folder, False, "wanted"))
    monkeypatch.setattr("fcntl.flock", refusing)
    run(*planned("split", folder, False))
    assert tree(folder / "target") == tree(folder / "wanted")
    shutil.rmtree(folder / "target")
    stopped(folder, at=3)
    before = tree(folder)
    for resume in (True, False):
        with pytest.raises(StorageError, match=r"this file system has no locks \(remove it if no run is writing\)"):
            run(*planned("split", folder, resume))
    assert tree(folder) == before


def test_nothing_to_resume_is_an_ordinary_run(folder: Path) -> None:
    assert run(*planned("split", folder, True)).resumed == 0
    run(*planned("split", folder, False, "wanted"))
    assert tree(folder / "target") == tree(folder / "wanted")


def test_without_resume_a_failure_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    before = tree(folder)
    monkeypatch.setattr(os, "fsync", failing)
    for resume in (False, True):  # nothing was finished: there is nothing to keep
        with pytest.raises(StorageError) as caught:
            run(*planned("split", folder, resume))
        assert caught.value.hint is None
        assert tree(folder) == before
        assert sorted(path.name for path in folder.iterdir()) == ["shards", "source", "tiny.yaml"]


@pytest.mark.parametrize(
    "engine", ["megatron", "dcp", *(pytest.param(e, marks=pytest.mark.sweep) for e in ("dcp-hf", "vllm"))]
)
def test_an_engines_files_go_on_too(engine: str, tmp_path: Path) -> None:
    """Their order is not that of the items, and their shards may not be those of ranks."""
    model, target = tmp_path / "model", tmp_path / "target"
    make_checkpoint(model)
    api.split(model, tmp_path / "wanted", tp=2, engine=engine, max_shard_size=10**6)
    words = [sys.executable, "-c", AFTER_ONE, str(model), str(target), engine]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = api.split(model, target, tp=2, engine=engine, max_shard_size=10**6, resume=True)
    assert again.resumed > 0
    assert tree(target) == tree(tmp_path / "wanted")


AFTER_ONE = """
import os, signal, sys
from tpshard import api
from tpshard.staging import Staging
def dying(self, portion):
    original(self, portion)
    os.kill(os.getpid(), signal.SIGKILL)
original, Staging.record = Staging.record, dying
api.split(sys.argv[1], sys.argv[2], tp=2, engine=sys.argv[3], max_shard_size=10**6)
"""


def test_the_command_line_says_what_was_kept(folder: Path) -> None:
    """Ctrl-C with --resume, then the same command again."""
    words = ["split", "source", "target", "--tp", "3", "--policy", "tiny.yaml", "--max-shard-size", "40000", "--resume"]
    script = (
        "import os, signal\nfrom tpshard.cli.main import main\nfrom tpshard.staging import Staging\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def record(self, portion):\n    original(self, portion)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "original, Staging.record = Staging.record, record\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "tpshard: interrupted; what is finished was kept: run again with --resume"
    again = subprocess.run(
        [sys.executable, "-m", "tpshard", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "of the files were finished before" in again.stdout


def test_portions_overlapping_in_the_journal_count_once(folder: Path) -> None:
    from tpshard.shares import usable

    plan = planned("split", folder, False)[0].plan
    records = [FileRecord(output.name, output.rank, output.part, 1, "x") for output in plan.outputs]
    of_part: dict[int, list[FileRecord]] = {}
    for record in records:
        of_part.setdefault(record.part, []).append(record)
    first, count = plan.outputs[0].first, plan.outputs[0].last - plan.outputs[0].first
    whole = Portion(tuple(of_part[0]), first, ("d",) * count, ((None,) * 3,) * count)
    one = Portion((of_part[0][0],), first, ("d",) * count, ((None,) * 3,) * count)
    lacking = Portion(tuple(of_part[0]), first, ("",) * count, ((None,) * 3,) * count)
    assert usable(plan, [whole, one], lambda file: True) == [whole]
    assert usable(plan, [one, whole], lambda file: True) == [one]
    assert usable(plan, [whole, one], lambda file: file.rank == 0) == [one]
    assert usable(plan, [lacking], lambda file: True) == []
