"""Run the application with uvicorn until SIGTERM or SIGINT, finishing running requests first."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from vlm.config.errors import RequestError
from vlm.serving.connections import TimedConnection
from vlm.serving.settings import ServerSettings


def bind(host: str, port: int) -> socket.socket:
    """A listening address; port 0 takes a free one. Raises RequestError when it is taken or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RequestError(f"cannot listen on {host}:{port}: {error.strerror}", remedy="choose another --host or --port") from error
    listener.set_inheritable(True)
    return listener


def serve(app: FastAPI, listener: socket.socket, settings: ServerSettings, *, started: Callable[[], None] | None = None) -> None:
    """Serve until a signal. Requests that run get `drain_seconds` to finish; new connections are refused."""
    _Server(config_of(app, settings), started).run(sockets=[listener])


def config_of(app: FastAPI, settings: ServerSettings, *, log_level: str = "warning") -> uvicorn.Config:
    """How uvicorn runs the application."""
    timed: Any = partial(TimedConnection, header_seconds=settings.header_seconds, write_seconds=settings.write_seconds)
    return uvicorn.Config(
        app,
        http=timed,
        log_level=log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=10,
        timeout_graceful_shutdown=settings.drain_seconds,
        h11_max_incomplete_event_size=64 * 1024,
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self._tell is not None and self.started:
            self._tell()
