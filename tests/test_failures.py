"""Whatever fails, at whatever moment: the output is as it was or complete, and the next run works (tests/failures)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.build import tree
from tests.failures.kinds import KINDS, kills, retried
from tests.failures.rounds import Case, Tally, around, every_call, fresh, judge, small_cases
from tests.failures.server import Action, Ended, Fault, Server, Side

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and a compiler"
)
ROOT = Path(__file__).parent.parent
Kind = Callable[[Server, Case, int | None], Iterator[Tally]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def cases(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {case.name: case for case in small_cases(server, tmp_path_factory.mktemp("failures"))}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_some_of_each_kind(kind: Kind, server: Server, cases: dict[str, Case]) -> None:
    for tally in kind(server, fresh(cases["split"]), 3):
        assert tally.rounds
    shutil.rmtree(cases["split"].place, ignore_errors=True)


def test_kill_at_every_writing_call_of_a_merge(server: Server, cases: dict[str, Case]) -> None:
    server.run(cases["split"].folder, cases["split"].words)
    tally = every_call(server, fresh(cases["merge"]), "kill -9", Action.KILL, Side.WRITES, None)
    assert (tally.rounds, tally.complete) == (
        len(cases["merge"].calls[Side.WRITES]),
        1,
    )  # the last: fsync of the parent
    shutil.rmtree(cases["split"].place)


def test_retried(server: Server, cases: dict[str, Case]) -> None:
    assert retried(server, fresh(cases["split"]), 30, 1).rounds == 30


def test_a_damaged_journal_is_not_believed(server: Server, cases: dict[str, Case]) -> None:
    """A bit of it changed, anywhere: what is gone on with gives the same bytes. Where the list of the run's own files is
    damaged, nobody knows whose they are: refused."""
    case, found = fresh(cases["split"]), 0
    case = replace(case, words=(*case.words, "--resume"))
    last = len(case.calls[Side.WRITES])
    for place in range(0, 100, 12):
        server.run(case.folder, case.words, Fault(Action.KILL, last - 3))
        (journal,) = case.folder.glob(".shards.tpshard-*.journal")
        raw = bytearray(journal.read_bytes())
        found += b'"digests"' in raw
        raw[len(raw) * place // 100] ^= 1
        journal.write_bytes(raw)
        ended = server.run(case.folder, case.words)
        if raw.index(b"\n") > len(raw) * place // 100:
            assert (ended.code, "is not from tpshard (move it away" in ended.err) == (2, True), ended.err
            shutil.rmtree(journal.with_suffix(""))
            ended = server.run(case.folder, case.words)
        assert ended.code == 0, ended.err
        assert tree(case.place) == case.whole
        fresh(case)
    assert found, "no journal had anything in it"


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["split", "reshard", "merge"])
def test_many_of_each_kind(name: str, server: Server, cases: dict[str, Case]) -> None:
    if name != "split":
        server.run(cases["split"].folder, cases["split"].words)
    for kind in KINDS:
        for tally in kind(server, fresh(cases[name]), None if kind is kills else 7):
            assert tally.rounds
    assert retried(server, fresh(cases[name]), 170, 2).rounds == 170
    shutil.rmtree(cases["split"].place, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- the harness itself


WRITING = "write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,fsync,fdatasync,syncfs,ftruncate,truncate," \
          "fallocate,rename,renameat,renameat2,mkdir,mkdirat,open,openat,creat,link,linkat,symlink,symlinkat"  # fmt: skip
AS_THE_SHIM_SAYS = {"pwritev2": "pwritev", "openat": "open", "creat": "open", "mkdirat": "mkdir"}


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_shim_sees_what_the_kernel_sees(server: Server, cases: dict[str, Case], tmp_path: Path) -> None:
    """Every system call that wrote, of a run without the shim."""
    case, log = fresh(cases["split"]), tmp_path / "calls"
    command = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", f"trace={WRITING}", sys.executable, "-m", "tpshard"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *case.words], cwd=case.folder, check=True, capture_output=True, env=environment)
    seen = []
    for line in log.read_text().splitlines():
        name = re.findall(r"^\d+ +(\w+)\(", line)
        if name and str(case.folder) in line and (not name[0].startswith("open") or "O_CREAT" in line):
            seen.append(AS_THE_SHIM_SAYS.get(name[0], name[0]))
    assert sorted(seen) == sorted(case.calls[Side.WRITES])
    shutil.rmtree(case.place)


def test_the_judge_is_not_blind(server: Server, cases: dict[str, Case]) -> None:
    case = fresh(cases["split"])
    ended, before = server.run(case.folder, case.words), around(case)

    def says(what: str, end: Ended = ended) -> None:
        with pytest.raises(AssertionError, match=what):
            judge(server, case, end, Tally("x"), before)

    (case.place / "config.json").write_bytes(case.whole["config.json"][:-1])
    says("half of an output")
    (case.place / "config.json").write_bytes(case.whole["config.json"])
    judge(server, case, ended, Tally("x"), before)
    (case.folder / "left").mkdir()
    says("left")
    (case.folder / "left").rmdir()
    says("two", replace(ended, code=5, err="tpshard: error: one\ntwo"))
    says("Traceback", replace(ended, code=5, err="Traceback"))
    shutil.rmtree(case.place)
    says("nothing is there", replace(ended, code=0))
