"""A folder on loopback, with the two headers that let a browser give WebAssembly threads.

    python -m samples.web.serve build/web        # prints the address; Ctrl-C ends it

Any static server will do instead: without Cross-Origin-Opener-Policy and Cross-Origin-Embedder-Policy the page runs on
one thread. Opened as a file:// address it does not run: browsers give such pages no modules.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

LOOPBACK = "127.0.0.1"


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder; nothing is written and no listing of a folder is given."""

    # What the machine's own table of types says differs by system, and browsers refuse modules of a wrong type.
    extensions_map: ClassVar[dict[str, str]] = {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".css": "text/css",
        ".json": "application/json",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # a model that was made again is asked for again
        super().end_headers()

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nothing: one line for each file is no use here."""


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Bound to loopback, not yet serving. port 0: any free one."""
    return ThreadingHTTPServer((LOOPBACK, port), partial(Handler, directory=str(folder)))


def address(running: ThreadingHTTPServer) -> str:
    return f"http://{LOOPBACK}:{running.server_address[1]}/"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of `folder`, served by a thread of this process until the block ends."""
    with server(folder) as running:
        thread = Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield address(running)
        finally:
            running.shutdown()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (args.folder / "index.html").is_file():
        parser.error(f"{args.folder} has no index.html: make the folder with python -m samples.web.make")
    with server(args.folder, args.port) as running:
        print(address(running), flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
