"""A Hub on this machine: as much of it as a client that reads a model asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(repositories: Path, token: str | None = None) -> Iterator[str]:
    """Serves the folders ``org/name`` below a folder, to all or to those with a token; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(tree|paths-info|revision)/[^/]+(?:/(.*))?)?", path)
            file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path)
            name = (found or file or [None, ""])[1]
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                self.send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "no access"})
            elif not name or not (repositories / name).is_dir():
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
            elif file:
                self.send_range(repositories / name / file[2])
            elif found and found[2] == "paths-info":
                paths = json.loads(asked)["paths"] if asked.startswith(b"{") else re.findall(rb"paths=([^&]+)", asked)
                texts = [text if isinstance(text, str) else text.decode() for text in paths]
                self.send_json([entry for text in texts if (entry := described(repositories / name, text))])
            elif found and found[2] == "tree":
                inside = repositories / name / (found[3] or "")
                all_below = "recursive=true" in self.path.lower()
                paths = sorted(inside.rglob("*") if all_below else inside.iterdir())
                self.send_json([described(repositories / name, str(p.relative_to(repositories / name))) for p in paths])
            else:
                self.send_json({"id": name, "sha": COMMIT, "siblings": [], "private": False})

        def send_range(self, path: Path) -> None:
            if not path.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
                return
            data = path.read_bytes()
            about = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not asked:
                self.send(200, data, about)
                return
            begin, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            about["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            self.send(206, data[begin : end + 1], about)

        def send_json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def described(repository: Path, name: str) -> dict[str, object] | None:
    path = repository / name
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": digest(path), "size": path.stat().st_size} if path.is_file() else None
