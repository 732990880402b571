"""Running one command and measuring it: wall time, and the memory of its process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.01  # seconds between looks at the memory


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. ``seconds`` of wall time from start to exit, without ``sync``, which was spent in fsync;
    ``anonymous`` and ``resident`` the largest RssAnon and VmHWM seen, in bytes."""

    seconds: float
    sync: float
    anonymous: int
    resident: int


class FailedError(Exception):
    """A measured command failed; its stderr."""


def run(command: Sequence[str]) -> Sample:
    """Measure a command. Where it prints JSON, as tpshard does with --json, its fsync time is taken from there."""
    peak = {"RssAnon": 0, "VmHWM": 0}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        stdout, stderr = process.communicate()
        seconds = time.perf_counter() - begin
        watcher.join()
    if process.returncode:
        raise FailedError(f"{' '.join(command)}: exit {process.returncode}\n{stderr}")
    written = json.loads(stdout).get("written") if stdout.startswith("{") else None
    sync = written["sync_seconds"] if written else 0.0
    return Sample(seconds - sync, sync, peak["RssAnon"], peak["VmHWM"])


def _watch(process: subprocess.Popen[str], peak: dict[str, int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.returncode is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:  # it has ended
            return
        for line in lines:
            key, _, value = line.partition(":")
            if key in peak:
                peak[key] = max(peak[key], int(value.split()[0]) * 1024)
        time.sleep(INTERVAL)


def warm(folder: Path) -> None:
    """Read a folder once, so that its files lie in the page cache."""
    buffer = bytearray(2**22)
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool() -> None:
    """Drop the page cache (as root). Raises OSError."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def touch(size: int) -> None:
    """Use so much memory and give it back.

    The host of a virtual machine may take back what the guest leaves free, and give it again page by page: the same
    copy then takes 0.6 or 6 seconds. Memory that was in use a moment ago is still there.
    """
    code = "import mmap, sys; m = mmap.mmap(-1, int(sys.argv[1])); m[::4096] = b'1' * len(range(0, len(m), 4096))"
    subprocess.run([sys.executable, "-c", code, str(size)], check=True)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
