"""An S3 server of a few lines that does what a good one does not: objects in memory, whoever asks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Oddity = Literal["knows no conditions", "loses an answer"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OddStore

    def _answer(self, code: int, body: bytes = b"", size: int | None = None) -> None:
        self.send_response(code)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        store, conditional = self.server, self.headers["If-None-Match"] == "*"
        if conditional and store.oddity == "knows no conditions":
            self._answer(501)
        elif conditional and self.path in store.objects:
            self._answer(412)
        else:
            store.objects[self.path] = body
            if store.oddity == "loses an answer" and not store.lost:
                store.lost = True
                self.close_connection = True
            else:
                self._answer(200)

    def do_GET(self) -> None:
        found = self.server.objects.get(self.path)
        self._answer(404 if found is None else 200, found or b"")

    def do_HEAD(self) -> None:
        found = self.server.objects.get(self.path)
        self._answer(404 if found is None else 200, size=len(found or b""))

    def do_POST(self) -> None:
        """Remove objects, that is: nothing else is asked for this way."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        bucket = self.path.partition("?")[0]
        for key in re.findall("<Key>(.*?)</Key>", body):
            self.server.objects.pop(f"{bucket}/{key}", None)
        self._answer(200, b"<DeleteResult/>")

    def log_request(self, code: object = "", size: object = "") -> None:
        """Nobody reads it."""


class OddStore(ThreadingHTTPServer):
    """`objects`: by their paths. `lost`: it has lost an answer."""

    daemon_threads = True

    def __init__(self, oddity: Oddity) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.oddity = oddity
        self.objects: dict[str, bytes] = {}
        self.lost = False

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running(oddity: Oddity) -> Iterator[OddStore]:
    """A server that answers, until the end of the block."""
    with OddStore(oddity) as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()
