"""What can happen, kind by kind; each gives a Tally of its rounds. ``most``: rounds at most, None for every call."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tests.build import tree
from tests.failures.rounds import (
    INTERRUPTED,
    KILLED,
    Case,
    Tally,
    around,
    check_message,
    clean_up,
    every_call,
    fresh,
    is_there,
    judge,
    one_round,
    places,
    run_again,
)  # fmt: skip
from tests.failures.server import Action, Fault, Server, Side

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MB = 2**20


def kills(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    yield every_call(server, case, "kill -9 before a writing call", Action.KILL, Side.WRITES, most)
    yield every_call(server, case, "kill -9 in a writing call", Action.TORN, Side.WRITES, most)
    yield every_call(server, case, "kill -9 before a reading call", Action.KILL, Side.READS, most)


def errors(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    for number in ERRORS:
        name = errno.errorcode[number]
        yield every_call(server, case, f"{name} at one writing call", Action.FAIL, Side.WRITES, most, number)
    name = "ENOSPC from a writing call on"
    yield every_call(server, case, name, Action.FAIL_ON, Side.WRITES, most, errno.ENOSPC)
    yield every_call(server, case, "EIO at one reading call", Action.FAIL, Side.READS, most, errno.EIO)


def half_done(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    """Calls that do less than they were asked for are no failures: the run goes through."""
    tally = Tally(f"{case.name}: short or interrupted calls")
    for side in (Side.WRITES, Side.READS):
        for action in (Action.SHORT, Action.INTERRUPT):
            for at in (0, 1):
                assert one_round(server, case, Fault(action, at, side), tally).code == 0
    yield tally
    yield every_call(server, case, "files that end early", Action.EMPTY, Side.READS, most)


def source_changes(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    """The source is cut short or written to at the k-th call: refused, or all of it is from before, or all from after."""
    files = sorted((case.folder / case.source).glob("*.safetensors"))
    for kind, action in (("shrinks", Action.SHRINK), ("is written to", Action.OVERWRITE)):
        tally = Tally(f"{case.name}: a source file {kind}")
        for victim in (files[0], files[-1], case.folder / case.source / "config.json"):
            content = victim.read_bytes()
            place = len(content) - 40
            changed = replace(case, other=_after(server, case, victim, place) if action is Action.OVERWRITE else {})
            for side in (Side.READS, Side.WRITES):
                for at in places(len(case.calls[side]), most):
                    before = around(case)
                    ended = server.run(case.folder, case.words, Fault(action, at, side, place, str(victim)))
                    assert victim.read_bytes() != content
                    victim.write_bytes(content)
                    judge(server, changed, ended, tally, before)
                    run_again(server, case)
                    clean_up(case, before)
        yield tally


def _after(server: Server, case: Case, victim: Path, place: int) -> Mapping[str, bytes]:
    """What comes of the source when it was written to before the run; nothing where that is refused."""
    content = victim.read_bytes()
    victim.write_bytes(content[:place] + b"changed" + content[place + 7 :])
    found = tree(case.place) if server.run(case.folder, case.words).code == 0 else {}
    victim.write_bytes(content)
    shutil.rmtree(case.place, ignore_errors=True)
    return found


def limits(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    tally = Tally(f"{case.name}: ulimit -n 16")
    one_round(server, case, Fault(limits={"NOFILE": 16}), tally)
    yield tally
    if case.name == "split":
        yield _many_files(server, case)
    tally = Tally(f"{case.name}: files of 1 kB to 150 kB at most")
    for size in (1_000, 20_000, 150_000):
        one_round(server, case, Fault(limits={"FSIZE": size}), tally)
    yield tally
    tally = Tally(f"{case.name}: 0 to 64 MB of memory more")
    for size in (0, MB // 2, MB, 2 * MB, 4 * MB, 8 * MB, 9 * MB, 12 * MB, 16 * MB, 20 * MB, 32 * MB, 64 * MB):
        one_round(server, case, Fault(limits={"AS": size}), tally)
    yield tally


def _many_files(server: Server, case: Case) -> Tally:
    """24 ranks are written at once."""
    (case.folder / "whole.yaml").write_text("name: whole\nrules: {}\ndefault: replicate\n")
    words = ("split", case.source, case.target, "--tp", "24", "--policy", "whole.yaml")
    assert server.run(case.folder, words).code == 0
    many = fresh(replace(case, words=words, whole=tree(case.place), check=()))
    tally = Tally(f"{case.name}: ulimit -n 16, 24 ranks")
    one_round(server, many, Fault(limits={"NOFILE": 16}), tally)
    (case.folder / "whole.yaml").unlink()
    return tally


def disks(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    """Real ones, where this process may mount: one without room from the k-th call on, and one that is read-only."""
    disk = case.folder / "disk"
    disk.mkdir()
    if not _mounted(disk, "size=20m"):
        disk.rmdir()
        return
    inside = replace(case, target="disk/target")
    words = tuple(inside.target if word == case.target else word for word in case.words)
    inside = replace(inside, words=words)
    tally = Tally(f"{case.name}: another fills the disk meanwhile")
    try:
        for at in places(len(case.calls[Side.WRITES]), most):
            running = server.start(case.folder, words, Fault(Action.STOP, at))
            assert server.wait(running) is None
            was_there = is_there(inside)
            _fill(disk / "full")
            os.kill(running, signal.SIGCONT)
            ended = server.wait(running)
            (disk / "full").unlink()
            assert ended is not None
            told = ("No space left on device", "are free (make room)")  # it may not have looked yet
            assert ended.code == 0 or any(what in ended.err for what in told), ended.err
            assert was_there <= is_there(inside)
            judge(server, inside, ended, tally, around(case))
            assert {path.name for path in disk.iterdir()} <= {"target"}
            run_again(server, inside)
            shutil.rmtree(inside.place)
        yield tally
        tally = Tally(f"{case.name}: a read-only disk")
        assert _mounted(disk, "remount,ro")
        ended = server.run(case.folder, words)
        assert ended.code == 5, ended.err
        judge(server, inside, ended, tally, around(case))
        yield tally
    finally:
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()


def _mounted(disk: Path, options: str) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return shutil.which("mount") is not None and not subprocess.run(words, capture_output=True, check=False).returncode


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def signals(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    for number in SIGNALS:
        for side in (Side.WRITES, Side.READS):
            name = f"{number.name} at a {'writing' if side is Side.WRITES else 'reading'} call"
            tally = every_call(server, case, name, Action.SIGNAL, side, most, number)
            assert set(tally.codes) <= {INTERRUPTED}, tally.codes
            yield tally


def two_writers(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    """One is stopped at its k-th writing call while another does all its work; whoever comes second is told."""
    tally = Tally(f"{case.name}: another run in the midst of it")
    names = case.calls[Side.WRITES]
    for at in places(len(names), most):
        before = around(case)
        first = server.start(case.folder, case.words, Fault(Action.STOP, at))
        assert server.wait(first) is None
        second = server.run(case.folder, case.words)
        check_message(second)
        os.kill(first, signal.SIGCONT)
        ended = server.wait(first)
        assert ended is not None
        assert {ended.code, second.code} == {0, 2}, (ended.err, second.err)
        judge(server, case, ended, tally, before)
        clean_up(case, before)
    yield tally


def resumed(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    """Killed at the k-th call, or out of room; ``--resume`` then gives the same bytes. Also where that is killed, too."""
    further = replace(case, words=(*case.words, "--resume"))
    for kind, action in (("killed", Action.KILL), ("killed in a call", Action.TORN), ("ENOSPC", Action.FAIL_ON)):
        tally = Tally(f"{case.name}: {kind}, then --resume")
        for at in places(len(case.calls[Side.WRITES]), most):
            before = around(case)
            ended = server.run(case.folder, further.words, Fault(action, at, value=errno.ENOSPC))
            judge(server, further, ended, tally, before, may_keep=True)
            run_again(server, further)
            assert around(case) == before or ended.code == KILLED
            clean_up(case, before)
        yield tally
    tally, chance = Tally(f"{case.name}: killed again and again with --resume"), random.Random(1)
    for _ in range(most or 50):
        before = around(case)
        while not is_there(case):
            fault = Fault(Action.KILL, chance.randint(1, len(case.calls[Side.WRITES]) + 5))
            ended = server.run(case.folder, further.words, fault)
            judge(server, further, ended, tally, around(case), may_keep=True)
        clean_up(case, before)
    yield tally


def targets(server: Server, case: Case, most: int | None) -> Iterator[Tally]:
    """What was at the target: another's files, which stay; an empty folder, which is taken in the end."""
    tally = Tally(f"{case.name}: a target that is in use")
    case.place.mkdir()
    (case.place / "mine").write_text("mine")
    before, kept = around(case), tree(case.place)
    ended = server.run(case.folder, case.words)
    check_message(ended)
    assert (ended.code, tree(case.place), around(case)) == (2, kept, before)
    tally.rounds, tally.untouched = 1, 1
    tally.codes[2] += 1
    shutil.rmtree(case.place)
    yield tally
    tally = Tally(f"{case.name}: an empty folder as target, ENOSPC")
    for at in places(len(case.calls[Side.WRITES]), most):
        case.place.mkdir()
        one_round(server, case, Fault(Action.FAIL, at, value=errno.ENOSPC), tally)
    yield tally


def random_fault(case: Case, chance: random.Random) -> Fault:
    """Any of them, at any moment."""
    side = chance.choice((Side.WRITES, Side.WRITES, Side.READS))
    action = chance.choice((Action.KILL, Action.TORN, Action.FAIL, Action.FAIL_ON, Action.SIGNAL, Action.SHORT))
    value = chance.choice(SIGNALS) if action is Action.SIGNAL else chance.choice(ERRORS)
    return Fault(action, chance.randint(1, len(case.calls[side])), side, value)


def retried(server: Server, case: Case, rounds: int, seed: int) -> Tally:
    """Runs into the same target with one fault after the other, until one gets through; then the next target."""
    tally, chance, outer = Tally(f"{case.name}: retried until it got through"), random.Random(seed), around(case)
    for _ in range(rounds):
        if is_there(case):
            clean_up(case, outer)
        judge(server, case, server.run(case.folder, case.words, random_fault(case, chance)), tally, around(case))
    run_again(server, case)
    clean_up(case, outer)
    return tally


KINDS: tuple[Callable[[Server, Case, int | None], Iterator[Tally]], ...] = (
    kills, errors, half_done, source_changes, limits, disks, signals, two_writers, targets, resumed,
)  # fmt: skip
