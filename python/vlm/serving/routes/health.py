"""GET /health, /health/live, /health/ready and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from vlm.serving.engine import Engine


def router(engine: Engine) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @routes.get("/health/ready", responses={503: {"description": "not ready"}})
    @routes.get("/health", include_in_schema=False)
    async def ready() -> JSONResponse:
        """The self-test has passed."""
        if engine.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "failed" if engine.failure else "starting"}, status_code=503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
