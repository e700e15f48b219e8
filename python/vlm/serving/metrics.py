"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Names follow the toolkit's convention: `vlm_requests_total{route,code}` and so on."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        registry = self.registry
        self.requests = Counter("vlm_requests", "Requests answered", ["route", "code"], registry=registry)
        self.seconds = Histogram("vlm_request_seconds", "Time of a request", ["route"], buckets=_SECONDS, registry=registry)
        self.stage = Histogram("vlm_stage_seconds", "Time of a stage", ["stage"], buckets=_SECONDS, registry=registry)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch = Histogram("vlm_batch_size", "Items of one model call", ["kind"], buckets=sizes, registry=registry)
        self.depth = Gauge("vlm_queue_depth", "Items waiting", registry=registry)
        self.inflight = Gauge("vlm_inflight", "Requests being answered", registry=registry)
        self.tokens = Counter("vlm_generated_tokens", "Tokens written", registry=registry)
        self.first_token = Histogram(
            "vlm_time_to_first_token_seconds", "From the queue to the first token", buckets=_SECONDS, registry=registry
        )
        self.rejected = Counter("vlm_rejected", "Requests or items refused", ["reason"], registry=registry)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Observe the time of a stage: decode, queue, model, encode."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stage.labels(stage).observe(time.perf_counter() - start)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class MetricsMiddleware:
    """Counts and times every request. Unknown paths share one label, so that a scanner cannot make metrics grow."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self.routes else "other"
        start, code = time.perf_counter(), 499  # 499: the client left before an answer

        async def watching(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        self.metrics.inflight.inc()
        try:
            await self.app(scope, receive, watching)
        finally:
            self.metrics.inflight.dec()
            self.metrics.requests.labels(route, str(code)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
