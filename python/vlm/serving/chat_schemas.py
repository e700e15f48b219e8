"""Requests and answers of POST /v1/chat/completions, in OpenAI's form. Unknown fields are refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from vlm.serving.schemas import MOST, Body, Part


class Turn(Body):
    """A message of the conversation; pictures stand in those of the user."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST)]
    name: str | None = None


class StreamOptions(Body):
    include_usage: bool = Field(default=False, description="a last chunk tells the usage")


class ChatRequest(Body):
    """OpenAI's request. What this server does not do is accepted only where it asks for nothing."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST)]
    max_tokens: int | None = Field(default=None, ge=1, description="longest answer in tokens")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the same under its newer name")
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False, description="0 takes the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0 is off; not OpenAI's")
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = Field(default=None, description="equal seeds give equal answers; default: a new one each time")
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(default=0.0, ge=0, le=0, description="0: there is none")
    frequency_penalty: float = Field(default=0.0, ge=0, le=0, description="0: there is none")
    logprobs: Literal[False] | None = None
    user: str | None = None


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: Answer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatUsage(BaseModel):
    prompt_tokens: int = Field(description="positions of the prompt, pictures expanded")
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None
