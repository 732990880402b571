"""Real store servers, started on a free port of this machine for the tests."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
ACCOUNT = "devstoreaccount1"
BUCKET = "models"
LONGEST_START = 60


@dataclass(frozen=True)
class Server:
    scheme: str
    port: int
    environment: dict[str, str]

    @property
    def root(self) -> str:
        return f"{self.scheme}://{BUCKET}"


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


@contextlib.contextmanager
def program(command: list[str], port: int) -> Iterator[None]:
    """A program that listens on a port; it has ended afterwards."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        started = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + LONGEST_START
            while not _listens(port):
                if started.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not start: {log.read().decode(errors='replace')}")
                time.sleep(0.05)
            yield
        finally:
            started.terminate()
            started.wait(10)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def s3() -> Iterator[Server]:
    port = free_port()
    with program(
        [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)], port
    ):
        _ask(port, "PUT", f"/{BUCKET}", {})
        yield Server("s3", port, s3_environment(port))


def s3_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_REGION": "us-east-1",
    }


def azurite() -> str | None:
    """The program, where npm has installed it: on the path, or beside this Python (.ci/run)."""
    beside = Path(sys.prefix) / "azurite/node_modules/.bin"
    return shutil.which("azurite-blob", path=f"{beside}{os.pathsep}{os.environ['PATH']}")


@contextlib.contextmanager
def azure() -> Iterator[Server]:
    port, found = free_port(), azurite()
    assert found is not None
    own = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with program([found, "--blobHost", "127.0.0.1", "--blobPort", str(port), *own], port):
        _make_container(port)
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
            "AZURE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
        }
        yield Server("az", port, environment)


def _make_container(port: int) -> None:
    now = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    said = f"x-ms-date:{now}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container"
    signed = hmac.new(base64.b64decode(AZURE_KEY), f"PUT{chr(10) * 12}{said}".encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": now,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}",
    }
    _ask(port, "PUT", f"/{ACCOUNT}/{BUCKET}?restype=container", headers)


@contextlib.contextmanager
def gcs() -> Iterator[Server]:
    port = free_port()
    start = "from gcp_storage_emulator.__main__ import main; main()"
    own = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"]
    with program([sys.executable, "-c", start, *own], port):
        yield Server("gs", port, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"})


def _ask(port: int, method: str, path: str, headers: dict[str, str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        assert answer.status in (200, 201), answer.read()
