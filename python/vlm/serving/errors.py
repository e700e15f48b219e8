"""Errors of the HTTP interface, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vlm.config.nearest import did_you_mean
from vlm.serving import chat_schemas as c
from vlm.serving import schemas as s

log = logging.getLogger("vlm.serving")

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}


class ApiError(Exception):
    """An answer that is an error. `param` names the part of the request, `code` is stable."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers
        super().__init__(message)

    def response(self) -> JSONResponse:
        return error_response(self.status, self.message, code=self.code, param=self.param, headers=self.headers)


def error_response(
    status: int, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    kind = _TYPES.get(status, "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Every error of the application leaves in one form, and none tells of the server's insides."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and media != "application/json":
            return error_response(415, "expected a JSON body with Content-Type: application/json", code="content_type")
        message, param = _first(error.errors())
        return error_response(400, message, code="invalid_request", param=param)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        said = str(error.detail)
        if error.status_code == 404:
            said = "there is no such route; GET /openapi.json lists those there are"
        elif error.status_code == 405:
            said = f"this route takes {headers.get('allow') or headers.get('Allow') or 'another method'}"
        return error_response(error.status_code, said, code=f"http_{error.status_code}", headers=headers)

    @app.exception_handler(Exception)
    async def _any(request: Request, error: Exception) -> JSONResponse:
        log.exception("request failed", exc_info=error)
        return error_response(500, "the server failed on this request; its log says why", code="internal_error")


_REQUESTS = (c.ChatRequest, c.StreamOptions, s.ChatMessage, s.ClassifyRequest, s.EmbeddingRequest, s.ImagePart, s.ImageUrl, s.TextPart)
_FIELDS = frozenset(
    name for model in _REQUESTS for name in model.model_fields
)


def _first(errors: Any) -> tuple[str, str | None]:
    """One sentence and the path of the problem; the client's own input is not echoed.

    Of a union every branch complains: the branch that came furthest is the one that was meant, and of several the one
    that found more than a wrong type.
    """
    problem: dict[str, Any] = max(errors, key=lambda e: (len(e.get("loc", ())), not str(e.get("type")).endswith("_type")), default={})
    if problem.get("type") == "json_invalid":
        return "the body is not valid JSON", None
    place: list[str] = []
    for part in problem.get("loc", ()):
        # Names of union branches stand between the names of fields, and say nothing to a client.
        if (isinstance(part, int) or part in _FIELDS or len(problem["loc"]) == 2) and part != "body" and place[-1:] != [str(part)]:
            place.append(str(part))
    param = ".".join(place) or None
    message = str(problem.get("msg", "the request does not fit the schema"))
    if problem.get("type") == "extra_forbidden":
        message = "there is no such field" + did_you_mean(str(problem["loc"][-1]), sorted(_FIELDS))
    return (f"{param}: {message}" if param else message), param
