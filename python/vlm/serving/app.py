"""The HTTP application: routes around one model, limits around the routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from vlm import __version__
from vlm.runtime.embedder import Embedder
from vlm.runtime.generation import Generator
from vlm.serving import errors
from vlm.serving.auth import ApiKey
from vlm.serving.body import BodyLimits
from vlm.serving.chat_engine import ChatEngine
from vlm.serving.engine import Engine
from vlm.serving.hosts import KnownHosts
from vlm.serving.metrics import Metrics, MetricsMiddleware
from vlm.serving.routes import chat, classify, embeddings, health, models, other_kind
from vlm.serving.settings import ServerSettings


def create_app(
    model: Embedder | Generator, settings: ServerSettings | None = None, *, api_keys: tuple[str, ...] = (),
    hosts: tuple[str, ...] | None = (),
) -> FastAPI:  # fmt: skip
    """The application that serves one model: chat of a generator, vectors of an embedder.

    `api_keys`: when given, every route but health needs one of them. `hosts`: names beside localhost that a request may say it
    came to; None: any.
    """
    settings = settings or ServerSettings()
    metrics = Metrics()
    engine: Any = ChatEngine(model, settings, metrics) if isinstance(model, Generator) else Engine(model, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.close()

    # No documentation pages: they load scripts from elsewhere. The schema itself is at /openapi.json.
    app = FastAPI(title="vlm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    writes = isinstance(engine, ChatEngine)
    for part in (*((chat,) if writes else (embeddings, classify)), models, health):
        app.include_router(part.router(engine))
    absent = other_kind.EMBEDS if writes else other_kind.WRITES
    instead = "it writes: POST /v1/chat/completions" if writes else "it embeds: POST /v1/embeddings or /v1/classify"
    app.include_router(other_kind.router(absent, f"{engine.name!r} is not of this kind; {instead}"))
    errors.install(app)
    # Added last, runs first: count, then the host, the key, the body.
    app.add_middleware(BodyLimits, settings=settings, metrics=metrics)
    if api_keys:
        app.add_middleware(ApiKey, keys=api_keys)
    if hosts is not None:
        app.add_middleware(KnownHosts, names=hosts)
    paths = frozenset(app.openapi()["paths"]) | {"/health", "/openapi.json"}
    app.add_middleware(MetricsMiddleware, metrics=metrics, routes=paths)
    return app
