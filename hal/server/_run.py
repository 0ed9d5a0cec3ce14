"""Running the application: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hal.errors import InputError
from hal.server._options import ServerOptions


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 chooses a free one.

    Raises:
        InputError: the port is in use or not allowed, or the host is not of this machine.
    """
    place = f"port {port} of {host}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise InputError(
            f"there is no host {host!r} ({error.strerror})", "for example --host 127.0.0.1"
        ) from None
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"{place} is in use", "choose another with --port, or 0 for any that is free"
            ) from None
        raise InputError(f"{place} cannot be used: {error.strerror}", "choose another") from None
    return found


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def run(
    app: FastAPI,
    listening: socket.socket,
    options: ServerOptions,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what was taken, and return.

    Args:
        app: from :func:`hal.server.create_app`.
        listening: from :func:`bind`; it is closed at the end.
        options: the same as the application's.
        ready: called when connections are accepted.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=options.drain_seconds,
    )
    # At its end uvicorn raises the signal again for whoever had it before; that is nobody here.
    before = {s: signal.signal(s, _ignore) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, ready).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The server has seen it."""
