"""Rounds: one run with one fault, what must hold afterwards, and the next run.

After every round the source is as it was, the target is as it was or complete, ``verify`` says which, the message is one
line, nothing else lies about (but for what a kill leaves, which is hidden and blocks nothing), and the same command, run
again, gives the same bytes as a run that met no fault.
"""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.build import POLICY, tiny_checkpoint, tree
from tests.failures.server import Action, Ended, Fault, Server, Side

INTERRUPTED = 130
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Case:
    """A command that makes the folder ``target`` from ``source``; ``whole``: the target's files after a run without
    faults, ``calls``: the system calls that it made; ``other``: of a source that was changed before the run."""

    name: str
    folder: Path
    words: tuple[str, ...]
    source: str
    target: str
    check: tuple[str, ...]
    whole: Mapping[str, bytes] = field(default_factory=dict)
    calls: Mapping[Side, Sequence[str]] = field(default_factory=dict)
    other: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        return self.folder / self.target


@dataclass
class Tally:
    """What came of the rounds of one kind."""

    kind: str
    rounds: int = 0
    untouched: int = 0
    complete: int = 0
    left: int = 0  # hidden folders that a kill left
    codes: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        sums = (
            getattr(self, name) + getattr(other, name) for name in ("rounds", "untouched", "complete", "left", "codes")
        )
        return Tally(self.kind, *sums)

    def row(self) -> str:
        codes = ", ".join(f"{code} x{count}" for code, count in sorted(self.codes.items()))
        return f"{self.kind:<48}{self.rounds:>7}{self.untouched:>11}{self.complete:>10}{self.left:>6}  {codes}"


HEAD = f"{'what happened':<48}{'rounds':>7}{'untouched':>11}{'complete':>10}{'left':>6}  exit codes"


def small_cases(server: Server, folder: Path) -> list[Case]:
    """Split, reshard and merge of a checkpoint of a few hundred kB; the originals stay in ``folder``."""
    tiny_checkpoint(folder / "source", layers=1, files=2)
    (folder / "tiny.yaml").write_text(POLICY)
    cases = []
    for name, words, source, check in (
        ("split", ("source", "shards", "--tp", "3", "--policy", "tiny.yaml"), "source", ("--against", "source")),
        ("reshard", ("shards", "one", "--tp", "1"), "shards", ("--against", "source")),
        ("merge", ("shards", "merged"), "shards", ()),
    ):
        case = Case(name, folder, (name, *words, "--workers", "2"), source, words[1], check)
        done = server.run(folder, case.words)
        assert done.code == 0, done.err
        cases.append(replace(case, whole=tree(case.place), calls=done.calls))
    assert cases[-1].whole == tree(folder / "source")
    for case in cases[1:]:
        shutil.rmtree(case.place)
    return cases


def fresh(case: Case) -> Case:
    """The case with nothing at its target."""
    shutil.rmtree(case.place, ignore_errors=True)
    return case


def around(case: Case) -> set[str]:
    """What lies in the folder, but for the target."""
    return {path.name for path in case.folder.iterdir()} - {case.target}


def check_message(ended: Ended) -> None:
    assert "Traceback" not in ended.err, ended.err
    assert "internal error" not in ended.err, ended.err
    lines = ended.err.strip().splitlines()  # click begins a new line after ^C
    if ended.code == INTERRUPTED:
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("tpshard: interrupted; "), ended.err
    elif ended.code > 0:
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("tpshard: error: "), ended.err
    else:
        assert ended.code in (0, KILLED), (ended.code, ended.err)


def one_round(server: Server, case: Case, fault: Fault, tally: Tally) -> Ended:
    """Run with the fault, look, run again, look; the target is taken away in the end."""
    before, source = around(case), tree(case.folder / case.source)
    ended = server.run(case.folder, case.words, fault)
    judge(server, case, ended, tally, before)
    assert tree(case.folder / case.source) == source, "the source was changed"
    existed = is_there(case)
    run_again(server, case)
    assert existed or around(case) == before, "the next run left what it found"
    clean_up(case, before)
    return ended


def judge(server: Server, case: Case, ended: Ended, tally: Tally, before: set[str], *, may_keep: bool = False) -> None:
    """What must hold after a run, however it ended. ``may_keep``: what is finished, for --resume."""
    check_message(ended)
    left = around(case) - before
    if ended.code == KILLED or may_keep:
        assert all(name.startswith(f".{case.target}.tpshard-") for name in left), left
    else:
        assert not left, left
    exists = is_there(case)
    if exists:
        assert tree(case.place) in (case.whole, case.other), "half of an output"
    assert exists or ended.code != 0, "done, and nothing is there"
    if case.name != "merge":
        against = case.check if not exists or tree(case.place) == case.whole else ()
        check = server.run(case.folder, ["verify", case.target, *against, "--level", "weights"])
        assert check.code == (0 if exists else 3), check.out + check.err
    tally.rounds += 1
    tally.complete += exists
    tally.untouched += not exists
    tally.left += len(left)
    tally.codes[ended.code] += 1


def is_there(case: Case) -> bool:
    """Whether the target is more than the empty folder that it may have been."""
    return case.place.exists() and any(case.place.iterdir())


def run_again(server: Server, case: Case) -> None:
    """The same command, without a fault: it makes the target, or says that it is there."""
    existed = is_there(case)
    again = server.run(case.folder, case.words)
    assert again.code == (2 if existed else 0), again.err
    assert existed or tree(case.place) == case.whole


def clean_up(case: Case, before: set[str]) -> None:
    shutil.rmtree(case.place)
    for name in around(case) - before:
        path = case.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def places(count: int, most: int | None) -> list[int]:
    """1 to ``count``, or so many of them, spread evenly, first and last among them."""
    if most is None or count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(number * (count - 1) / (most - 1)) for number in range(most)})


def every_call(
    server: Server, case: Case, kind: str, action: Action, side: Side, most: int | None, value: int = 0
) -> Tally:
    """A fault at the first call, at the second, … at the last one; one more, and nothing happens."""
    tally, count = Tally(f"{case.name}: {kind}"), len(case.calls[side])
    for at in places(count, most):
        ended = one_round(server, case, Fault(action, at, side, value), tally)
        if action in (Action.KILL, Action.TORN, Action.FAIL) and len(ended.calls[side]) >= at:
            killed = action is not Action.FAIL
            assert (ended.code == KILLED) == killed, (at, ended.err)
            assert ended.code != 0, f"nobody minded that call {at} failed"
    return tally
