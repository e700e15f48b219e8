"""POST /v1/embeddings: texts and pictures to vectors, in OpenAI's form and vLLM's `messages` form."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter, Request

from vlm.serving.engine import Engine
from vlm.serving.errors import ApiError
from vlm.serving.inputs import Item, check_count, image_item, text_item
from vlm.serving.routes.models import check_model
from vlm.serving.schemas import (
    EVERY_ERROR,
    ChatMessage,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    ImagePart,
    TextPart,
    Usage,
    errors,
)
from vlm.serving.settings import ServerSettings


def router(engine: Engine) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", response_model=None, responses={200: {"model": EmbeddingResponse}, **errors(*EVERY_ERROR)})
    async def embeddings(body: EmbeddingRequest, request: Request) -> EmbeddingResponse:
        check_model(engine, body.model)
        items = items_of(body, engine.settings)
        _check_dimensions(body.dimensions, getattr(engine.embedder, "width", None))
        rows = await engine.embed(items, request)
        _check_dimensions(body.dimensions, rows.shape[1])
        with engine.metrics.timed("encode"):
            data = [Embedding(index=i, embedding=encoded(row, body.encoding_format)) for i, row in enumerate(rows)]
            tokens = engine.count_tokens(items)
            return EmbeddingResponse(model=engine.name, data=data, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))

    return routes


def _check_dimensions(asked: int | None, width: int | None) -> None:
    """Raises ApiError 400: a prefix of a vector means nothing unless the model was trained so."""
    if asked is not None and width is not None and asked != width:
        message = f"dimensions: this model gives {width} numbers and was not trained to be cut to {asked}"
        raise ApiError(400, message, code="dimensions", param="dimensions")


def encoded(row: np.ndarray, form: str) -> list[float] | str:
    """A vector as numbers, or as base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    return [float(x) for x in row]


def items_of(body: EmbeddingRequest, settings: ServerSettings) -> list[Item]:
    """The texts and pictures of a request, in order. Raises ApiError for anything else."""
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "expected exactly one of input and messages", code="invalid_request", param="input")
    if body.messages is not None:
        return [_of_messages(body.messages, settings)]
    given = body.input if isinstance(body.input, list) else [body.input]
    check_count(len(given), settings)
    many = isinstance(body.input, list)
    return [_of_entry(entry, f"input.{i}" if many else "input", body.modality, settings) for i, entry in enumerate(given)]


def _of_entry(entry: object, param: str, modality: str, settings: ServerSettings) -> Item:
    if isinstance(entry, str):
        return image_item(entry, settings, param) if modality == "image" else text_item(entry, settings, param)
    if isinstance(entry, TextPart):
        return text_item(entry.text, settings, param)
    if isinstance(entry, ImagePart):
        return image_item(_url(entry), settings, param)
    raise ApiError(400, f"{param}: token ids are not accepted, send the text", code="token_input", param=param)


def _url(part: ImagePart) -> str:
    return part.image_url if isinstance(part.image_url, str) else part.image_url.url


def _of_messages(messages: list[ChatMessage], settings: ServerSettings) -> Item:
    """One conversation is one vector, and a dual encoder embeds one text or one picture."""
    parts: list[Item] = []
    for i, message in enumerate(messages):
        content = [message.content] if isinstance(message.content, str) else message.content
        parts += [_of_entry(entry, f"messages.{i}.content.{j}", "text", settings) for j, entry in enumerate(content)]
    if len(parts) != 1:
        raise ApiError(
            400,
            f"messages: {len(parts)} content parts; this model embeds one text or one picture a request, use input for more",
            code="messages",
            param="messages",
        )
    return parts[0]
