"""GET /health, /health/live, /health/ready and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from vlm.serving.engine import Engine
from vlm.serving.schemas import Health, errors


def router(engine: Engine) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health/live")
    async def live() -> Health:
        """The process answers."""
        return Health(status="live")

    @routes.get("/health/ready", response_model=Health, responses={503: {"model": Health, "description": "not ready"}})
    @routes.get("/health", include_in_schema=False)
    async def ready() -> JSONResponse:
        """The self-test has passed."""
        if engine.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "failed" if engine.failure else "starting"}, status_code=503)

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @routes.get("/metrics", response_class=Response, responses={**text, **errors(401, 500)})
    async def metrics() -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
