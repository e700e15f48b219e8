"""Routes of the other kind of model: 404 that says what is served here."""

from __future__ import annotations

from fastapi import APIRouter

from vlm.serving.errors import ApiError

EMBEDS = ("/v1/embeddings", "/v1/classify")
WRITES = ("/v1/chat/completions",)


def router(paths: tuple[str, ...], message: str) -> APIRouter:
    """POST on `paths` answers 404 with `message`; the schema does not list them."""
    routes = APIRouter()

    async def refuse() -> None:
        raise ApiError(404, message, code="wrong_kind_of_model")

    for path in paths:
        routes.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)
    return routes
