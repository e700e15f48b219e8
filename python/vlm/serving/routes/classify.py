"""POST /v1/classify: which label fits a picture."""

from __future__ import annotations

from fastapi import APIRouter, Request

from vlm.config.errors import RequestError
from vlm.runtime.embedder import probabilities, scores
from vlm.runtime.prompt import LearnedPrompt, prompt_of
from vlm.serving.engine import Engine
from vlm.serving.errors import ApiError
from vlm.serving.inputs import image_item, text_item
from vlm.serving.routes.models import check_model
from vlm.serving.schemas import (
    EVERY_ERROR,
    ClassifyRequest,
    ClassifyResponse,
    ImagePart,
    ImageUrl,
    Score,
    errors,
)


def router(engine: Engine) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/classify", response_model=None, responses={200: {"model": ClassifyResponse}, **errors(*EVERY_ERROR)})
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyResponse:
        check_model(engine, body.model)
        if len(body.labels) > engine.settings.max_labels:
            raise ApiError(400, f"labels: {len(body.labels)}, at most {engine.settings.max_labels}", code="too_many_labels", param="labels")
        learned = prompt_of(engine.embedder)
        if body.template is not None and "{}" not in body.template:
            raise ApiError(400, "template: expected {} where the label goes", code="template", param="template")
        items = [image_item(_url(body.image), engine.settings, "image")]
        for i, label in enumerate(body.labels):
            if not label:
                raise ApiError(400, f"labels.{i}: the text is empty", code="empty_text", param=f"labels.{i}")
            items.append(text_item(_text(label, body.template, learned, f"labels.{i}"), engine.settings, f"labels.{i}"))
        rows = await engine.embed(items, request)
        values = scores(engine.embedder, rows[:1], rows[1:])
        chances = probabilities(values, engine.embedder.form)[0]
        order = sorted(range(len(body.labels)), key=lambda i: -values[0, i])
        data = [Score(index=i, label=body.labels[i], score=float(values[0, i]), probability=float(chances[i])) for i in order]
        return ClassifyResponse(model=engine.name, form=engine.embedder.form, data=data)

    return routes


def _text(label: str, template: str | None, learned: LearnedPrompt | None, param: str) -> str:
    """The label by the template, else by the prompt that the model has learned. Raises ApiError for a class that it has not."""
    if template is not None or learned is None:
        return (template or "{}").replace("{}", label)
    try:
        return learned.text(label)
    except RequestError as error:
        raise ApiError(400, f"{param}: {error.message}", code="unknown_class", param=param) from error


def _url(image: ImagePart | ImageUrl | str) -> str:
    if isinstance(image, ImagePart):
        image = image.image_url
    return image if isinstance(image, str) else image.url
