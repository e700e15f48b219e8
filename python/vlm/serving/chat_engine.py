"""The writing model behind the server: pictures and messages to prompts, settings, self-test."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm.config.errors import DataError, RequestError
from vlm.runtime.chat import Message, PicturePart
from vlm.runtime.generation import Decoding, Generator, Prompt, generate
from vlm.runtime.pictures import BadPicture
from vlm.serving.chat_schemas import ChatRequest
from vlm.serving.errors import ApiError
from vlm.serving.inputs import Item, image_item, text_item
from vlm.serving.lifecycle import Served
from vlm.serving.metrics import Metrics
from vlm.serving.schemas import ImagePart
from vlm.serving.settings import ServerSettings
from vlm.serving.writing import Job, Writer

log = logging.getLogger("vlm.serving")


@dataclass(frozen=True)
class Asked:
    """A request, ready to be answered. positions: of the prompt, pictures expanded."""

    prompt: Prompt
    positions: int
    decoding: Decoding
    key: str


class ChatEngine(Served):
    """One generator, shared by all requests."""

    def __init__(self, generator: Generator, settings: ServerSettings, metrics: Metrics) -> None:
        self._writer = Writer(generator, settings, metrics)
        super().__init__(generator.name, settings, self._writer)
        self.generator, self.metrics = generator, metrics

    def _check(self) -> None:
        """The golden answers of a bundle; of another model, that it writes a token."""
        test = getattr(self.generator, "self_test", None)
        if test is not None:
            test()
            return
        prompt = self.generator.prompt([Message("user", ("a",))], [])
        generate(self.generator, [prompt], Decoding(max_new_tokens=1))

    def check_ready(self) -> None:
        """Raises ApiError 503 before the self-test has passed and while stopping, 429 when the queue is full."""
        if not self.ready:
            raise ApiError(503, self.failure or "the server is starting", code="not_ready", headers={"Retry-After": "1"})
        self._writer.check_room()

    def begin(self, asked: Asked, deadline: float) -> Job:
        """The answer in the queue. Raises ApiError 429 or 503."""
        return self._writer.put(asked.prompt, asked.decoding, asked.key, deadline)

    async def prepare(self, body: ChatRequest, deadline: float) -> Asked:
        """Raises ApiError: 400 for a request that is wrong or too long, 413 and 422 for a picture, 504 past the deadline."""
        messages, items = conversation(body, self.settings)
        pictures = [await self._picture(item, deadline) for item in items[:1]]
        # All pictures take as many positions: whether they fit is known before the others cost anything.
        prompt = await self._prompt(messages, pictures * len(items), deadline)
        positions, new = self.generator.positions(prompt), body.max_completion_tokens or body.max_tokens
        new = self._check_length(positions, new)
        if len(items) > 1:
            pictures += [await self._picture(item, deadline) for item in items[1:]]
            prompt = await self._prompt(messages, pictures, deadline)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return Asked(prompt, positions, settings_of(body, new), f"seed {seed}")

    async def _prompt(self, messages: list[Message], pictures: list[Any], deadline: float) -> Prompt:
        try:
            prompt: Prompt = await self._off_loop(deadline, self.generator.prompt, messages, pictures)
        except DataError as error:
            raise ApiError(400, f"messages: {error.message}", code="bad_messages", param="messages") from error
        return prompt

    def _check_length(self, positions: int, asked: int | None) -> int:
        """Tokens of the answer, at most. Raises ApiError 400 when prompt and answer do not fit."""
        room = self.generator.length - positions
        new = asked if asked is not None else min(room, self.settings.max_new_tokens)
        if room < 1 or new > room:
            raise ApiError(
                400,
                f"the prompt takes {positions} positions and the answer up to {max(new, 1)}; "
                f"{self.name} has {self.generator.length} together",
                code="context_length_exceeded",
                param="messages" if room < 1 else "max_tokens",
            )
        return new

    async def _picture(self, item: Item, deadline: float) -> Any:
        try:
            return await self._off_loop(deadline, self._decode, item.value)
        except BadPicture as error:
            status = 413 if error.reason in ("too_many_pixels", "too_many_bytes") else 422
            raise ApiError(status, f"{item.param}: {error.message}", code=error.reason, param=item.param) from error

    def _decode(self, data: str | bytes) -> Any:
        if isinstance(data, str):
            raise TypeError("a string would be read as a path")
        with self.metrics.timed("decode"):
            return self.generator.prepare_image(data, self.settings.pictures)

    async def _off_loop(self, deadline: float, call: Any, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await asyncio.get_running_loop().run_in_executor(self._decoders, call, *arguments)
        except TimeoutError:
            raise ApiError(504, "the request took longer than the server's deadline", code="deadline") from None


def conversation(body: ChatRequest, settings: ServerSettings) -> tuple[list[Message], list[Item]]:
    """(messages, pictures in order) of a request. Raises ApiError for what may not be sent; nothing is fetched."""
    messages: list[Message] = []
    pictures: list[Item] = []
    characters = 0
    for i, message in enumerate(body.messages):
        parts: list[str | PicturePart] = []
        for j, part in enumerate([message.content] if isinstance(message.content, str) else message.content):
            param = f"messages.{i}.content" + ("" if isinstance(message.content, str) else f".{j}")
            if isinstance(part, ImagePart):
                url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
                if len(pictures) >= settings.max_pictures:
                    raise ApiError(400, f"{param}: at most {settings.max_pictures} pictures a request", code="too_many_items", param=param)
                pictures.append(image_item(url, settings, param))
                parts.append(PicturePart())
                continue
            text = part if isinstance(part, str) else part.text
            if text:  # an empty one beside a picture asks nothing
                text_item(text, settings, param)
                parts.append(text)
            characters += len(text)
            if characters > settings.max_characters:
                message_ = f"{param}: {characters} characters in all messages, at most {settings.max_characters}"
                raise ApiError(400, message_, code="text_too_long", param=param)
        messages.append(Message(message.role, tuple(parts)))
    if messages[-1].role != "user":
        raise ApiError(400, "messages: the last message is not the user's", code="bad_messages", param="messages")
    return messages, pictures


def settings_of(body: ChatRequest, new: int) -> Decoding:
    """The decoding of a request. Its seed is not here but in the key, so that requests of other seeds share a batch."""
    stops: Sequence[str] = [] if body.stop is None else [body.stop] if isinstance(body.stop, str) else body.stop
    try:
        if body.temperature == 0:
            return Decoding(max_new_tokens=new, stop=tuple(stops))
        return Decoding(
            strategy="sample", temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, max_new_tokens=new, stop=tuple(stops)
        )
    except RequestError as error:
        raise ApiError(400, error.message, code="invalid_request", param=(error.where or "").removeprefix("decoding.") or None) from error
