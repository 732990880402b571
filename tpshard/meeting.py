"""How the processes of one run find each other, and talk: each of them with the first, in lines of JSON.

They share the folder that is written to, so that is where they meet: the first listens at a port that is free, and
writes down, in a file beside the staging folder, its addresses and a secret. No variable has to say where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpshard.errors import StorageError, UsageError
from tpshard.launch import HERE, Launch

PATIENCE = 5.0  # seconds for a word from someone who has just connected
PAUSE = 0.05  # seconds between looks at the file
ALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))  # a machine that is gone
MOST = 2**16  # characters from someone who is not known yet
SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address

Word = Mapping[str, Any]
STRANGER: Word = {"stranger": True}


class LostError(Exception):
    """The other end is gone."""


class Line:
    """A connection to one process. ``host``: where it says it runs; ``rank``: which it is."""

    def __init__(self, connection: socket.socket, rank: int = 0, host: str = "") -> None:
        self.rank, self.host = rank, host
        self._socket, self._file, self._sending = connection, connection.makefile("rb"), threading.Lock()

    def say(self, word: Word) -> None:
        """Raises LostError."""
        line = json.dumps(word, separators=(",", ":")).encode("utf-8") + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError:
            raise LostError from None

    def hear(self, limit: int = -1) -> dict[str, Any]:
        """The next word. Raises LostError."""
        try:
            line = self._file.readline(limit)
            word = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            word = None
        if not isinstance(word, dict):
            raise LostError
        return word

    def patient(self, patient: bool) -> None:
        """Whether to wait for a word as long as the other lives."""
        self._socket.settimeout(None if patient else PATIENCE)
        if patient:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ALIVE:
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def close(self) -> None:
        """End it, for whoever is listening, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()


def gather(launch: Launch, path: Path, hello: Word, timeout: float) -> dict[int, tuple[Line, Word]]:
    """The first process waits for the others: each one's line, and what it said at first. Raises StorageError where
    not all come in time."""
    found: dict[int, tuple[Line, Word]] = {}
    secret, end = secrets.token_hex(16), time.monotonic() + timeout
    with _listening() as listener:
        _write(path, {"addresses": _addresses(launch), "port": listener.getsockname()[1], "secret": secret})
        try:
            while len(found) < launch.size - 1:
                listener.settimeout(max(0.001, end - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, launch.size)) - set(found))
                    what = f"of {launch.size} processes {', '.join(map(str, missing[:10]))} did not come"
                    raise StorageError(f"{what} in {timeout:g} s", hint="do all see the same folder?") from None
                welcome = _welcome(connection, secret, launch, hello)
                if welcome is not None:
                    found.setdefault(welcome[0].rank, welcome)  # a second one of a number waits in vain
        except BaseException:
            for line, _ in found.values():
                line.close()
            raise
        finally:
            path.unlink(missing_ok=True)
    return found


def _welcome(connection: socket.socket, secret: str, launch: Launch, hello: Word) -> tuple[Line, Word] | None:
    """Someone who has connected, if it is one of this launch."""
    line, challenge = Line(connection), secrets.token_hex(16)
    line.patient(False)
    try:
        line.say({"challenge": challenge})
        said = line.hear(MOST)
        if not hmac.compare_digest(str(said.get("proof")), _proof(secret, challenge)):
            raise LostError
        line.rank, line.host = int(said["rank"]), str(said["host"])
        ours = (said["job"], said["size"]) == (launch.job, launch.size) and 0 < line.rank < launch.size
        line.say({**(hello if ours else STRANGER), "proof": _proof(secret, str(said["challenge"]))})
        line.patient(True)
    except (LostError, KeyError, ValueError, OSError):
        ours = False
    if ours:
        return line, said
    line.close()
    return None


def join(launch: Launch, path: Path, hello: Word, timeout: float) -> tuple[Line, Word]:
    """Another process goes to the first: its line, and what that said at first. Raises StorageError where it is not
    found in time, UsageError where it is another launch's."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for address, port, secret in _read(path):
            found = _call(address, port, secret, launch, hello)
            if found is None:
                continue
            if "stranger" in found[1]:
                found[0].close()
                raise UsageError("another run is writing the same folder", hint="wait for it, or give another folder")
            return found
        time.sleep(PAUSE)
    what = f"process {launch.rank} of {launch.size} did not find the first in {timeout:g} s"
    raise StorageError(what, hint=f"it writes {path}: do all see the same folder?")


def _call(address: str, port: int, secret: str, launch: Launch, hello: Word) -> tuple[Line, Word] | None:
    try:
        line = Line(socket.create_connection((address, port), PATIENCE))
    except OSError:
        return None
    try:
        line.patient(False)
        own = secrets.token_hex(16)
        proof = _proof(secret, str(line.hear(MOST)["challenge"]))
        known = {"rank": launch.rank, "size": launch.size, "job": launch.job, "host": socket.gethostname()}
        line.say({**hello, **known, "proof": proof, "challenge": own})
        said = line.hear()
        if not hmac.compare_digest(str(said.get("proof")), _proof(secret, own)):
            raise LostError
        line.patient(True)
    except (LostError, KeyError, OSError):
        line.close()
        return None
    return line, said


def _proof(secret: str, challenge: str) -> str:
    return hmac.new(secret.encode(), challenge.encode(), "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- addresses


def _listening() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    return socket.create_server(("", 0), backlog=512)


def _addresses(launch: Launch) -> list[str]:
    """All by which this machine may be reached, the launcher's word first."""
    return list(dict.fromkeys([*([launch.address] if launch.address else []), HERE, *_ipv4(), *_ipv6()]))


def _ipv4() -> list[str]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                said = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(said[20:24]))
    return found


def _ipv6() -> list[str]:
    """Of global scope; others say nothing without the interface."""
    try:
        lines = Path("/proc/net/if_inet6").read_text("ascii").splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(own[0])) for own in fields if own[3] == "00"]


def _write(path: Path, data: Word) -> None:
    """Readable by this user alone."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(data, file)


def _read(path: Path) -> list[tuple[str, int, str]]:
    """Nothing where it is not there, or not complete yet."""
    try:
        data = json.loads(path.read_text("utf-8"))
        return [(str(address), int(data["port"]), str(data["secret"])) for address in data["addresses"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
