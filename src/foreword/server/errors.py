"""The one shape that every error has, OpenAI's: `{"error": {"message", "type", "param", "code"}}`.

Handlers turn what FastAPI, Starlette and pydantic raise into it. Nothing of the server's inside is told: what went
wrong there is logged and answered by a plain 500.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

__all__ = ["ApiError", "add_handlers", "bad_request", "overloaded", "too_late", "unavailable", "unknown_model"]

_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
# What fields with several forms expect; pydantic would complain about each form by itself.
_FORMS = {
    "prompt": "expected a string, a list of strings, a list of token ids or a list of those, none of them empty",
    "stop": "expected a string or at most 4 strings, each of 1 to 256 characters",
    "content": "expected a string or a list of text parts",
}


class ApiError(HTTPException):
    """An answer that is an error: its status, and what the error object says.

    >>> ApiError(404, "no such model", param="model").body
    {'error': {'message': 'no such model', 'type': 'invalid_request_error', 'param': 'model', 'code': None}}
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error object; text that is not UTF-8 is made so."""
        message = self.detail.encode("utf-8", "replace").decode()
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, dict(self.headers or {}))


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str) -> ApiError:
    """A name that is no model, or another tenant's: nobody can tell which from the answer."""
    message = f"The model `{name[:200]}` does not exist or you do not have access to it."
    return ApiError(404, message, param="model", code="model_not_found")


def overloaded(message: str, retry_after_seconds: float, code: str) -> ApiError:
    """Too much is asked at once; Retry-After says when to come again."""
    retry = {"Retry-After": str(max(1, math.ceil(retry_after_seconds)))}
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=retry)


def unavailable(message: str, code: str = "unavailable", retry_after_seconds: int = 5) -> ApiError:
    """The server takes no requests for a while."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_seconds)})


def too_late() -> ApiError:
    """A request that took longer than it may."""
    return ApiError(504, "The request took too long.", kind="timeout_error", code="deadline_exceeded")


def add_handlers(app: FastAPI, fields: frozenset[str]) -> None:
    """Let all errors of an application have the one shape; `fields` are the names that `param` may be made of."""

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            code = _CODES.get(error.status_code, "error")
            error = ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        return error.response()

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _from_validation(error.errors(), fields).response()

    async def on_failure(_: Request, __: Exception) -> JSONResponse:
        return ApiError(500, "The server had an error while processing the request.", code="internal_error").response()

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(Exception, on_failure)


def _from_validation(errors: Sequence[Any], fields: frozenset[str]) -> ApiError:
    first = errors[0]
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return bad_request("The body is not JSON.", code="invalid_json")
    if place == ("body",) and kind in ("missing", "model_attributes_type"):
        return bad_request("The body must be a JSON object, with the content type application/json.")
    path = []
    for part in place[1:]:  # the branches of a union are parts too, and no names that a client knows
        if isinstance(part, str) and part not in fields and kind != "extra_forbidden":
            break
        path.append(str(part)[:100])
    param = ".".join(path) or None
    if kind == "extra_forbidden":
        return bad_request(f"The field `{param}` is not known or not supported.", param, "unknown_field")
    forms = _FORMS.get(next((part for part in reversed(path) if not part.isdigit()), ""))
    if kind == "missing":
        return bad_request(f"The field `{param}` is required.", param, "missing_field")
    return bad_request(f"`{param}`: {forms or first['msg']}.", param)
