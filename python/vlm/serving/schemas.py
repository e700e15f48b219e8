"""Requests and answers of the HTTP interface, as pydantic models. Unknown fields are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Body(BaseModel):
    """A part of a request. Unknown fields are refused; null is read as left out, as clients send what they have no value for."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        return {name: v for name, v in value.items() if v is not None or name not in cls.model_fields} if isinstance(value, dict) else value


class ImageUrl(Body):
    url: str = Field(description="data:image/png;base64,... (nothing is fetched)")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl | str


class TextPart(Body):
    type: Literal["text"]
    text: str


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]

MOST = 4096
"""Length of any list: a longer one is refused before its entries are looked at, so that it cannot cost memory."""
TokenIds = Annotated[list[int], Field(max_length=MOST)]


class ChatMessage(Body):
    role: str
    content: str | Annotated[list[Part], Field(max_length=MOST)]
    name: str | None = None


_PICTURE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAIAAAB7QOjdAAAAD0lEQVR42mP4z8DAwMAAAAYBAQAJ7PpUAAAAAElFTkSuQmCC"
"""Two pixels, for the examples of the OpenAPI document."""


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class EmbeddingRequest(Body):
    """OpenAI's request, whose input may also hold pictures; or `messages`, as vLLM takes them."""

    model_config = _examples({"input": ["a red circle", {"type": "image_url", "image_url": {"url": _PICTURE}}]})

    model: str | None = None
    input: str | Part | Annotated[list[str | Part | int | TokenIds], Field(max_length=MOST)] | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=MOST)] | None = None
    modality: Literal["text", "image"] = Field(default="text", description="what plain strings of the input are")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(gt=0, strict=True)] | None = None
    user: str | None = None


class ClassifyRequest(Body):
    """A picture and the labels to score it with."""

    model_config = _examples({"image": _PICTURE, "labels": ["red circle", "blue square"], "template": "a photo of a {}"})

    model: str | None = None
    image: ImagePart | ImageUrl | str = Field(description="a data URI, or an image_url part")
    labels: list[str] = Field(min_length=1, max_length=MOST)
    template: str | None = Field(
        default=None,
        max_length=1000,
        description="text of a label, {} stands for it; default: the prompt that the model has learned, else {}",
    )
    user: str | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage


class Score(BaseModel):
    index: int
    label: str
    score: float = Field(description="scale * cosine + bias")
    probability: float


class ClassifyResponse(BaseModel):
    object: Literal["classification"] = "classification"
    model: str
    form: Literal["softmax", "sigmoid"]
    data: list[Score]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlm"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str = Field(description="what is wrong, what was expected")
    type: str
    param: str | None = Field(description="the part of the request that is wrong, as input.3")
    code: str = Field(description="a stable name of the error")


class ErrorResponse(BaseModel):
    """Every answer that is no success, as OpenAI's clients expect it."""

    error: ErrorDetail


class Health(BaseModel):
    status: Literal["live", "ready", "starting", "failed"]


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route besides its success, for the OpenAPI document."""
    return {code: {"description": _MEANING[code], "model": ErrorResponse} for code in codes}


_MEANING = {
    400: "the request is wrong",
    401: "a key is needed",
    404: "the model is not served here",
    408: "the body came too slowly",
    413: "body or picture too large",
    415: "media type not accepted",
    421: "this server does not go by that name",
    422: "the picture cannot be read",
    429: "too many requests, or the queue is full",
    500: "the server failed",
    503: "starting or stopping",
    504: "the deadline passed",
}
EVERY_ERROR = tuple(_MEANING)
"""What a route that takes a body may answer besides its success."""
