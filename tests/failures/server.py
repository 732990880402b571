"""Runs of the command line that fail on demand: a process with the shim loaded, which has tpshard imported, forks for
each run and tells how it ended. Only forking makes hundreds of rounds a matter of seconds.

``Server`` is the side of the tests; run as a program, this file is the other.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LONGEST = 120  # seconds: a run that has not ended by then says where it waits, and fails


class Action(IntEnum):
    """What happens at the k-th call, as in shim.c."""

    NOTHING = 0
    KILL = 1  # SIGKILL instead of the call
    TORN = 2  # SIGKILL after half of the call
    FAIL = 3  # this one call fails, with the errno given
    FAIL_ON = 4  # and all after it
    SHORT = 5  # from here on, half of what was asked for
    INTERRUPT = 6  # every second call fails with EINTR
    SIGNAL = 7  # the signal given, to the whole process
    STOP = 8  # SIGSTOP: another run may come between
    SHRINK = 9  # the victim is cut to so many bytes
    OVERWRITE = 10  # the victim is written to, at this place
    EMPTY = 11  # from here on, nothing is read


class Side(IntEnum):
    """Which calls are counted for it."""

    WRITES = 0
    READS = 1
    REMOVALS = 2


@dataclass(frozen=True)
class Fault:
    """One fault. ``limits``: of the process, such as ``{"NOFILE": 16}``; ``AS`` counts from what it has at the start."""

    action: Action = Action.NOTHING
    at: int = 0
    side: Side = Side.WRITES
    value: int = 0
    victim: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """``code``: the exit code, or minus the signal that ended it; ``calls``: the names of the counted calls by side."""

    code: int
    out: str
    err: str
    calls: Mapping[Side, Sequence[str]]


def compiled(folder: Path) -> Path:
    """The shim as a library."""
    path = folder / "shim.so"
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, HERE / "shim.c"], check=True)
    return path


class Server:
    """Use as a context manager."""

    def __enter__(self) -> Server:
        self._scratch = tempfile.TemporaryDirectory(prefix="tpshard-failures-")
        shim = compiled(Path(self._scratch.name))
        environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONDONTWRITEBYTECODE": "1", "TPSHARD_SHIM": str(shim)}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), self._scratch.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._scratch.cleanup()

    def run(self, folder: Path, words: Sequence[str], fault: Fault = Fault()) -> Ended:
        """``tpshard WORDS`` in a folder, from start to end."""
        ended = self.wait(self.start(folder, words, fault))
        assert ended is not None, "it was stopped"
        return ended

    def start(self, folder: Path, words: Sequence[str], fault: Fault = Fault()) -> int:
        """Its process."""
        wanted = {**vars(fault), "folder": str(folder), "words": list(words)}
        return int(self._ask({"start": wanted})["process"])

    def wait(self, process: int) -> Ended | None:
        """How it ended; None where it was stopped, and waits for SIGCONT."""
        told = self._ask({"wait": process})
        if told["stopped"]:
            return None
        calls = {side: [line[2:] for line in told["calls"] if line[0] == str(int(side))] for side in Side}
        return Ended(told["code"], told["out"], told["err"], calls)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the server is gone"
        return json.loads(answer)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- the other side


def serve(scratch: Path) -> None:
    import_all()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: dict[str, Any] = {"process": start(scratch, request["start"])}
        else:
            answer = wait(scratch, request["wait"])
        print(json.dumps(answer), flush=True)


def import_all() -> None:
    """What a run would import, so that it reads no file of its own."""
    import click.formatting
    import yaml

    import tpshard.cli.main as main
    from tpshard.library import builtin_policies

    for name in main.COMMANDS:
        main.tpshard.get_command(click.Context(main.tpshard), name)
    builtin_policies()
    yaml.safe_load("a: 1")


def start(scratch: Path, wanted: Mapping[str, Any]) -> int:
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        code = carry_out(scratch, wanted)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def carry_out(scratch: Path, wanted: Mapping[str, Any]) -> int:
    me = os.getpid()
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(scratch / f"{me}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    names = os.open(scratch / f"{me}.calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.chdir(wanted["folder"])
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["tpshard", *wanted["words"]]
    for name, limit in wanted["limits"].items():
        if name == "AS":  # beyond what the process has already
            limit += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    arm = ctypes.CDLL(os.environ["TPSHARD_SHIM"]).shim_arm
    folder, victim = os.fsencode(wanted["folder"]), os.fsencode(wanted["victim"])
    arm(folder, wanted["side"], wanted["action"], wanted["at"], wanted["value"], victim, names)
    from tpshard.cli.main import main

    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)


def wait(scratch: Path, process: int) -> dict[str, Any]:
    _, status = os.waitpid(process, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"stopped": True}
    told = {name: (scratch / f"{process}.{name}").read_text("utf-8", "replace") for name in ("out", "err", "calls")}
    for name in told:
        (scratch / f"{process}.{name}").unlink()
    code = os.waitstatus_to_exitcode(status)
    return {"stopped": False, "code": code, **told, "calls": told["calls"].splitlines()}


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
