"""What every request passes first: the key, and the size of its body."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hal.server._errors import ApiError
from hal.server._options import ServerOptions

_DISCARDED = 16
"""A body this many times the limit is read to its end, so that the client sees the answer."""


class Gate:
    """Refuses calls without the key and with too large a body, before anything is parsed."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._key = None if options.api_key is None else options.api_key.encode()
        self._limit = options.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, or answer it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        if self._key is not None and not _has_key(scope["headers"], self._key):
            wrong = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            await wrong.response()(scope, receive, send)
            return
        body = await self._body(receive)
        if body is None:
            large = ApiError(
                413, f"the body is larger than {self._limit} bytes", code="body_too_large"
            )
            await large.response()(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, again, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body; None if it is too large."""
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(body)  # the client has left; what follows will find out
            part = message.get("body", b"")
            size += len(part)
            if size <= self._limit:
                body += part
            if not message.get("more_body") or size > _DISCARDED * self._limit:
                return bytes(body) if size <= self._limit else None


def _has_key(headers: Iterable[tuple[bytes, bytes]], key: bytes) -> bool:
    given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    return scheme.lower() == b"bearer" and secrets.compare_digest(token.strip(), key)
