"""Connections that cost nothing when their client does nothing: a request must begin in time, and an answer must be read."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """Closes a connection whose request line and headers are not there `header_seconds` after it was opened or began to send,
    and cuts one whose client has taken nothing of an answer for `write_seconds`."""

    def __init__(self, *given: Any, header_seconds: float, write_seconds: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._header_seconds, self._write_seconds = header_seconds, write_seconds
        self._headers: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._headers = self._stopped(self._headers)
        elif self._headers is None and not self.transport.is_closing():
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers, self._unread = self._stopped(self._headers), self._stopped(self._unread)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            # Closing would wait for what is not read.
            self._unread = self.loop.call_later(self._write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._unread = self._stopped(self._unread)
        super().resume_writing()

    def _wait_for_headers(self) -> None:
        self._headers = self.loop.call_later(self._header_seconds, self.transport.close)

    def _stopped(self, timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
        """None, in place of a timer that is no longer wanted."""
        if timer is not None:
            timer.cancel()
        return None
