"""The HTTP application: routes around one embedder, limits around the routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from vlm import __version__
from vlm.runtime.embedder import Embedder
from vlm.serving import errors
from vlm.serving.auth import ApiKey
from vlm.serving.body import BodyLimits
from vlm.serving.engine import Engine
from vlm.serving.metrics import Metrics, MetricsMiddleware
from vlm.serving.routes import classify, embeddings, health, models
from vlm.serving.settings import ServerSettings


def create_app(embedder: Embedder, settings: ServerSettings | None = None, *, api_keys: tuple[str, ...] = ()) -> FastAPI:
    """The application that serves one embedder. `api_keys`: when given, every route but health needs one of them."""
    settings = settings or ServerSettings()
    metrics = Metrics()
    engine = Engine(embedder, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.close()

    # No documentation pages: they load scripts from elsewhere. The schema itself is at /openapi.json.
    app = FastAPI(title="vlm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    for part in (embeddings, classify, models, health):
        app.include_router(part.router(engine))
    errors.install(app)
    # Added last, runs first: count, then the key, then the body.
    app.add_middleware(BodyLimits, settings=settings, metrics=metrics)
    if api_keys:
        app.add_middleware(ApiKey, keys=api_keys)
    paths = frozenset(app.openapi()["paths"]) | {"/health", "/openapi.json"}
    app.add_middleware(MetricsMiddleware, metrics=metrics, routes=paths)
    return app
