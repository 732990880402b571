"""A server in front of another that counts what passes, and answers wrongly where a test wants it to."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


Fault = Callable[[str, str, Answer], Answer | None]  # method, path, the right answer: another, or None for that one


@dataclass
class Proxy:
    """``fault`` may be set at any time; ``seen``: each request (its method, its path and range) with how many bytes its answer had."""

    port: int
    fault: Fault = lambda method, path, answer: None
    seen: list[tuple[str, str, int]] = field(default_factory=list)

    def bytes_of(self, name: str) -> int:
        """How many bytes of objects of this name were sent; what a client asked for again counts once."""
        return sum(size for method, path, size in set(self.seen) if method == "GET" and name in path)


def refusal(status: int, code: str) -> Answer:
    """As S3 says no."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return Answer(status, {"Content-Type": "application/xml"}, body)


@contextlib.contextmanager
def proxy(behind: int) -> Iterator[Proxy]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", behind, timeout=30)) as connection:
                connection.request(self.command, self.path, body, dict(self.headers))
                there = connection.getresponse()
                answer = Answer(there.status, dict(there.getheaders()), there.read())
            answer = told.fault(self.command, self.path, answer) or answer
            told.seen.append((self.command, f"{self.path} {self.headers.get('Range')}", len(answer.body)))
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(answer.body))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        told = Proxy(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()
