"""Runs a page's model in headless Chromium: chromium.py BROWSER FOLDER.

Inputs come on stdin one after the other, outputs go to stdout, as with a program. The page fetches
them here by HTTP, so any browser would do, without a driver. The file is run by the target's own
environment, so it needs Python alone.
"""

from __future__ import annotations

import http.server
import json
import math
import os
import queue
import secrets
import string
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).parent / "web" / "drive.html"
Answer = tuple[str, bytes]


def size_of(port: dict[str, Any]) -> int:
    """Bytes of an input or output of ``model.json``."""
    shape: list[int] = port["shape"]
    bits = port["dtype"].lstrip(string.ascii_lowercase) or "8"  # bool
    return math.prod(shape) * int(bits) // 8


class Handler(http.server.SimpleHTTPRequestHandler):
    """The page's files, and the two queues; only under a path that nobody else knows."""

    protocol_version = "HTTP/1.1"
    # Head and body in one packet at once; else each call waits for an acknowledgement, 40 ms.
    wbufsize = -1
    disable_nagle_algorithm = True
    secret: str
    messages: queue.SimpleQueue[bytes]
    answers: queue.SimpleQueue[Answer]

    def do_GET(self) -> None:
        """A file, the driver or the next message, for which it waits."""
        if not self._known():
            return
        if self.path == "/next":
            self._answer(self.messages.get())
        elif self.path == "/drive.html":
            self._answer(DRIVER.read_bytes(), "text/html")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """Outputs, or what failed."""
        if self._known():
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.answers.put((self.path, body))
            self._answer(b"")

    def log_message(self, *_: object) -> None:
        """Nothing: stderr is for what goes wrong."""

    def _known(self) -> bool:
        secret, _, rest = self.path.removeprefix("/").partition("/")
        if secret != self.secret:
            self.send_error(404)
            return False
        self.path = "/" + rest
        return True

    def _answer(self, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def started(browser: Path, folder: Path, address: str, log: Path) -> subprocess.Popen[bytes]:
    """The browser, with the page at ``address``; its profile lies beside ``folder``."""
    files = browser.parents[3]  # where Debian's packages are unpacked
    found = [*files.glob("lib/*-linux-gnu*"), *files.glob("usr/lib/*-linux-gnu*")]
    paths = [str(p) for each in found for p in (each, each / "pulseaudio")]
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    variables = {**os.environ, "LD_LIBRARY_PATH": ":".join(paths), "HOME": str(home)}
    command = [
        str(browser), "--headless", "--disable-gpu", "--disable-breakpad", "--no-first-run",
        # Containers lack what the sandbox is made of, and the page is our own.
        "--no-sandbox", "--no-zygote", "--disable-dev-shm-usage",
        "--disable-background-networking", f"--user-data-dir={home}", address,
    ]  # fmt: skip
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=variables
        )


def main() -> None:
    """Command line."""
    browser, folder = Path(sys.argv[1]), Path(sys.argv[2])
    model = json.loads((folder / "model.json").read_text())
    taken = sum(size_of(port) for port in model["inputs"])
    given = sum(size_of(port) for port in model["outputs"])
    Handler.secret = secrets.token_urlsafe()
    Handler.messages, Handler.answers = queue.SimpleQueue(), queue.SimpleQueue()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{Handler.secret}/drive.html"
    log = Path(tempfile.mkstemp(dir=folder.parent, suffix=".log")[1])
    process = started(browser, folder, address, log)

    def ended() -> None:
        code = process.wait()
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        told = lines[-1] if lines else f"exit code {code}"
        Handler.answers.put(("/failed", f"the browser ended: {told}".encode()))

    threading.Thread(target=ended, daemon=True).start()
    try:
        while len(message := sys.stdin.buffer.read(taken)) == taken:
            Handler.messages.put(message)
            path, body = Handler.answers.get()
            if path != "/done" or len(body) != given:
                sys.exit(body.decode(errors="replace") or "no outputs came")
            sys.stdout.buffer.write(body)
            sys.stdout.buffer.flush()
    finally:
        process.kill()


if __name__ == "__main__":
    main()
