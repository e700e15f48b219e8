"""GET /v1/models, and the check that a request means the model that is here."""

from __future__ import annotations

from fastapi import APIRouter

from vlm.serving.engine import Engine
from vlm.serving.errors import ApiError
from vlm.serving.schemas import ModelCard, ModelList, errors


def router(engine: Engine) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **errors(401, 500)})
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=engine.name, created=engine.created)])

    return routes


def check_model(engine: Engine, name: str | None) -> None:
    """Raises ApiError 404 for a model that is not served here."""
    if name is not None and name != engine.name:
        raise ApiError(404, f"model: {name[:200]!r} is not served here, {engine.name!r} is", code="model_not_found", param="model")
