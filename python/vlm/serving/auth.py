"""An API key guards every route but health."""

from __future__ import annotations

import hmac
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm.config.errors import RequestError
from vlm.serving.errors import error_response

OPEN = frozenset({"/health", "/health/live", "/health/ready"})


class ApiKey:
    """Refuses requests without `Authorization: Bearer KEY` with 401, before anything of them is read."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._allowed(Headers(scope=scope)):
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            response = error_response(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key", headers=headers)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Every key is compared, in constant time each: the time taken tells nothing of a key.
        matches = [hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and lines that begin with # are left out. Raises RequestError."""
    try:
        if path.stat().st_size > 2**16:
            raise RequestError("larger than 64 KiB", where=str(path), remedy="one key a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}", where=str(path)) from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or min(len(key) for key in keys) < 8:
        raise RequestError("expected keys of at least 8 characters, one a line", where=str(path))
    return keys
