"""The page of a run that goes on, over HTTP on this machine only.

files of the runs -> page, made anew once they have changed -> GET /, and GET /version to poll

Files are only read; nothing is written anywhere.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fireopd_jax.config import UserError
from fireopd_jax.report.page import page
from fireopd_jax.report.reading import open_run

LOOPBACK = "127.0.0.1"
EVERY_S = 10.0
"""Least number of seconds between two pages."""
PATTERNS = ("*.json*", "config.yaml", "completions/*.parquet", "eval/*", "controls/*/*.jsonl")
"""Files whose change makes a page old."""


class WatchedPage:
    """The page of some runs; raises UserError for a path that is no run."""

    def __init__(self, runs: Sequence[str]):
        self._runs = list(runs)
        self._paths = [open_run(run).path for run in runs]
        self._lock = threading.Lock()
        self._made = (-EVERY_S, "", b"")
        """When it was made, of which version, and the page."""

    def version(self) -> str:
        """Return a text that changes with the runs' files."""
        newest, total = 0, 0
        for file in self._files():
            try:
                found = file.stat()
            except OSError:  # renamed meanwhile
                continue
            newest, total = max(newest, found.st_mtime_ns), total + found.st_size
        return f"{newest}-{total}"

    def html(self) -> bytes:
        """Return the page, made anew if a file has changed and the last one is not too young."""
        with self._lock:
            when, of, made = self._made
            version = self.version()
            if not made or (version != of and time.monotonic() - when >= EVERY_S):
                made = page([open_run(run) for run in self._runs]).encode()
                self._made = (time.monotonic(), version, made)
            return made

    def _files(self) -> Iterator[Path]:
        for path in self._paths:
            for pattern in PATTERNS:
                yield from path.glob(pattern)


@contextmanager
def watching(watched: WatchedPage, port: int) -> Iterator[str]:
    """Serve the page in a thread while the block runs; yield its address.

    Raises UserError for a port that is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = (self.headers.get("Host") or "").rpartition(":")[0]
            if name not in (LOOPBACK, "localhost"):  # another site's name that leads here
                self._answer(HTTPStatus.FORBIDDEN, b"expected this machine's own name\n")
                return
            try:
                if self.path == "/":
                    self._answer(HTTPStatus.OK, watched.html(), "text/html; charset=utf-8")
                elif self.path == "/version":
                    self._answer(HTTPStatus.OK, watched.version().encode())
                else:
                    self._answer(HTTPStatus.NOT_FOUND, b"expected / or /version\n")
            except UserError as error:  # the run has been removed
                self._answer(HTTPStatus.GONE, f"{error}\n".encode())

        def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: the page asks every few seconds."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Ignore a browser that closes its side."""

    try:
        server = Server((LOOPBACK, port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; expected a free one, or 0") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, name="watch", daemon=True)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
