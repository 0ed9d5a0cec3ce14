"""Failures in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hal.errors import HalError
from hal.runtime.engine import EngineBusy, EngineClosed

_LOG = logging.getLogger("hal.server")
_RETRY = {"Retry-After": "1"}

_PARAMETERS = {"max_new_tokens": "max_tokens"}
"""What clients call an option that is called otherwise here."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """As clients expect it."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": kinds.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        retry = self.status in (429, 503)
        return JSONResponse(self.body(), self.status, _RETRY if retry else None)


def refusal(error: HalError) -> ApiError:
    """Why a request was not taken."""
    message = f"{error.message}: {error.hint}" if error.hint else error.message
    if isinstance(error, EngineBusy):
        return ApiError(429, message, code="queue_full")
    if isinstance(error, EngineClosed):
        return ApiError(503, message, code="shutting_down")
    word = message.split(" ", 1)[0]
    param = _PARAMETERS.get(word, word) if word.isidentifier() and "_" in word else None
    if param is None and word in ("temperature", "seed", "stop", "grammar"):
        param = word
    code = "context_length_exceeded" if "positions" in error.message else None
    return ApiError(400, message, param=param, code=code)


def failure(error: Exception) -> ApiError:
    """Why a request that was taken came to no end."""
    if isinstance(error, EngineClosed):
        return refusal(error)
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, f"the model failed: {error}", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Make everything that goes wrong an answer in that form."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HalError)
    async def _hal(_: Request, error: HalError) -> JSONResponse:
        return refusal(error).response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _explained(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: f"there is no {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def _other(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"internal error: {type(error).__name__}").response()


def _explained(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    first = errors[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")
    place = [str(part) for part in first["loc"] if part != "body"]
    # A union's alternatives follow its field; what the field got says enough.
    param = place[0] if place else None
    text = str(first["msg"]).removeprefix("Value error, ")
    if param is None:
        return ApiError(400, f"the body is not a JSON object of this call: {text}")
    where = ".".join(p for p in place if p.isidentifier() or p.isdigit())
    return ApiError(400, f"{where}: {text}", param=param)
