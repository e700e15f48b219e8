"""POST /v1/chat/completions: messages with pictures to an answer, whole or as it is written."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vlm.config.errors import VlmError
from vlm.runtime.generation import Event
from vlm.serving.chat_engine import Asked, ChatEngine
from vlm.serving.chat_schemas import (
    Answer,
    ChatChunk,
    ChatRequest,
    ChatResponse,
    ChatUsage,
    Choice,
    ChunkChoice,
    Delta,
)
from vlm.serving.errors import ApiError
from vlm.serving.lifecycle import unless_gone
from vlm.serving.routes.models import check_model
from vlm.serving.schemas import EVERY_ERROR, errors
from vlm.serving.writing import Job, log

Result = TypeVar("Result")


def router(engine: ChatEngine) -> APIRouter:
    routes = APIRouter()
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "model": ChatResponse,
            "description": "the answer; with stream, events of chat.completion.chunk and then [DONE]",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }

    @routes.post("/v1/chat/completions", response_model=None, responses={**answers, **errors(*EVERY_ERROR)})
    async def chat(body: ChatRequest, request: Request) -> ChatResponse | StreamingResponse:
        check_model(engine, body.model)  # type: ignore[arg-type]
        deadline = time.monotonic() + engine.settings.deadline_seconds
        engine.check_ready()
        asked = await unless_gone(request, engine.prepare(body, deadline))
        job = engine.begin(asked, deadline)
        reply = _Reply(engine, asked, body)
        if not body.stream:
            return await unless_gone(request, reply.whole(job))
        return _Stream(job, reply.events(job), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return routes


class _Stream(StreamingResponse):
    """Ends its answer however it ends, also when the client has left before the first event."""

    def __init__(self, job: Job, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled.set()


class _Reply:
    """One answer in OpenAI's form."""

    def __init__(self, engine: ChatEngine, asked: Asked, body: ChatRequest) -> None:
        self._engine, self._asked = engine, asked
        self._about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": engine.name}
        self._tells_usage = body.stream_options is not None and body.stream_options.include_usage
        self._tokens = 0

    async def whole(self, job: Job) -> ChatResponse:
        """Raises ApiError: 504 past the deadline, 400 for what the model refuses."""
        texts = []
        event: Event | None = None
        try:
            async for event in job.read():
                texts.append(event.text)
                self._count(event)
        except VlmError as error:
            raise ApiError(400, error.message, code="bad_input") from error
        assert event is not None
        assert event.finish_reason is not None
        choice = Choice(message=Answer(content="".join(texts)), finish_reason=event.finish_reason)
        return ChatResponse(**self._about, choices=[choice], usage=self._usage())

    async def events(self, job: Job) -> AsyncIterator[str]:
        """Server-sent events. An error after the first is an event of its own, and the last."""
        try:
            yield self._chunk(Delta(role="assistant", content=""))
            async for event in job.read():
                self._count(event)
                if event.text:
                    yield self._chunk(Delta(content=event.text))
                if event.finish_reason is not None:
                    yield self._chunk(Delta(), event.finish_reason)
            if self._tells_usage:
                yield _event(ChatChunk(**self._about, choices=[], usage=self._usage()).model_dump())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(json.loads(bytes(error.response().body)))
        except VlmError as error:
            yield _event(json.loads(bytes(ApiError(400, error.message, code="bad_input").response().body)))
        except Exception as error:
            log.exception("a stream failed", exc_info=error)
            failed = ApiError(500, "the server failed on this request; its log says why", code="internal_error")
            yield _event(json.loads(bytes(failed.response().body)))

    def _chunk(self, delta: Delta, reason: Any = None) -> str:
        chunk = ChatChunk(**self._about, choices=[ChunkChoice(delta=delta, finish_reason=reason)])
        value = chunk.model_dump(exclude=None if self._tells_usage else {"usage"})  # null but in the last, as OpenAI has it
        value["choices"][0]["delta"] = delta.model_dump(exclude_none=True)
        return _event(value)

    def _count(self, event: Event) -> None:
        """The token that ends an answer is none of its tokens."""
        self._tokens += event.token not in self._engine.generator.eos_ids or event.finish_reason != "stop"

    def _usage(self) -> ChatUsage:
        prompt = self._asked.positions
        return ChatUsage(prompt_tokens=prompt, completion_tokens=self._tokens, total_tokens=prompt + self._tokens)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
