"""`vlm generate`: answers to prompts with pictures, one at a time or a JSON line each."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vlm.config.errors import DataError, ExitCode, RequestError

if TYPE_CHECKING:
    from vlm.runtime.generation import Completion, Decoding, Prompt


@click.command(name="generate")
@click.argument("model", metavar="MODEL")
@click.option("--image", "images", multiple=True, metavar="PATH", help="a picture, or - for one on stdin; again for more, in order")
@click.option("--prompt", metavar="TEXT", help="what is asked; - reads it from stdin")
@click.option(
    "--jsonl", metavar="-|PATH",
    help='requests, a line each: {"prompt" or "messages", "image": path, data URI or a list}; an "id" comes back',
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="longest answer in tokens")
@click.option("--temperature", type=click.FloatRange(min=0), help="draw tokens, logits divided by this; 0 takes the likeliest")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="draw from the fewest tokens that reach this probability")
@click.option("--top-k", type=click.IntRange(min=0), help="draw from the k likeliest tokens; 0 is off")
@click.option("--beams", type=click.IntRange(min=1), help="beam search with so many beams")
@click.option("--seed", type=int, default=0, show_default=True, help="of the draws")
@click.option("--stop", multiple=True, metavar="TEXT", help="ends the answer and is not part of it; again for more")
@click.option("--contrast", type=float, metavar="ALPHA", help="against the prompt without its pictures, with this strength")
@click.option("--template", metavar="NAME", help="how messages become text [default: the model's own]")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=8, show_default=True, help="prompts of --jsonl at a time")
@click.option("--threads", type=click.IntRange(min=1), help="threads of one operator [default: the framework's choice]")
@click.option("--json", "as_json", is_flag=True, help="one JSON object: text, ids, finish_reason, prompt_tokens, completion_tokens")
def command(
    model: str, images: tuple[str, ...], prompt: str | None, jsonl: str | None, max_new_tokens: int, temperature: float | None,
    top_p: float | None, top_k: int | None, beams: int | None, seed: int, stop: tuple[str, ...], contrast: float | None,
    template: str | None, batch_size: int, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Answer a prompt about pictures, or continue a text.

    MODEL is a run, a Hugging Face directory (LLaVA, Llama, Qwen2) or a bundle, which needs no torch. The likeliest token is
    taken unless --temperature, --top-p or --top-k is given. With --jsonl a request that cannot be answered gives
    {"error"}, and the exit code is then 3.
    """
    if (prompt is None) == (jsonl is None):
        example = 'vlm generate MODEL --image x.png --prompt "what is this?"'
        raise RequestError("expected exactly one of --prompt and --jsonl", remedy=example)
    if jsonl is not None and images:
        raise RequestError("--image goes with --prompt; requests of --jsonl name their own")
    decoding = _decoding(max_new_tokens, temperature, top_p, top_k, beams, seed, stop, contrast)

    from vlm.cli.generators import open_generator

    generator = open_generator(model, threads=threads, batch_size=batch_size, template=template)
    if contrast is not None and generator.negatives is None:
        raise RequestError("this model reads no pictures, so there is no prompt without them", where="--contrast")
    if prompt is not None:
        _one(generator, images, _read(prompt), decoding, as_json)
    elif jsonl is not None:
        _many(generator, jsonl, decoding, batch_size)


def _decoding(
    max_new_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None, beams: int | None, seed: int,
    stop: tuple[str, ...], contrast: float | None,
) -> Decoding:  # fmt: skip
    from vlm.runtime.generation import Contrast, Decoding

    draws = temperature is not None or top_p is not None or top_k is not None
    if draws and beams is not None:
        raise RequestError("beam search draws nothing: --beams goes without --temperature, --top-p and --top-k")
    shared: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": stop,
        "contrast": None if contrast is None else Contrast(alpha=contrast),
    }
    if beams is not None:
        return Decoding(strategy="beam", beams=beams, **shared)
    if not draws:
        return Decoding(**shared)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    shared |= {name: value for name, value in given.items() if value is not None}
    return Decoding(strategy="sample", seed=seed, **shared)


def _read(prompt: str) -> str:
    if prompt != "-":
        return prompt
    data = sys.stdin.buffer.read(_MAX_TEXT + 1)
    if len(data) > _MAX_TEXT:
        raise RequestError(f"longer than {_MAX_TEXT} bytes", where="stdin")
    return data.decode("utf-8", "replace").rstrip("\r\n")


_MAX_TEXT = 1 << 20
_MAX_PICTURE = 64 * 2**20
_MAX_PICTURES = 256
_MAX_LINE = 128 * 2**20


def _one(generator: Any, images: Sequence[str], text: str, decoding: Decoding, as_json: bool) -> None:
    from vlm.cli.output import echo_json
    from vlm.runtime.generation import stream

    if images:
        _reads_pictures(generator, "--image")
    shown = [generator.prepare_image(sys.stdin.buffer.read(_MAX_PICTURE) if image == "-" else image) for image in images]
    prompt = generator.prompt([user_message(text, len(shown))], shown)
    if as_json:
        echo_json(_row(generator, prompt, _answers(generator, [prompt], decoding, ["prompt"])[0]))
        return
    for event in stream(generator, [prompt], decoding, keys=["prompt"], negatives=generator.negatives):
        sys.stdout.write(_printable(event.text))
        if event.text and sys.stdout.isatty():
            sys.stdout.flush()
    sys.stdout.write("\n")


def _reads_pictures(generator: Any, where: str | None = None) -> None:
    """Raises RequestError where pictures were given to a language model."""
    if generator.negatives is None:
        raise RequestError("this model reads no pictures", where=where, remedy="give a vision-language model")


def _printable(text: str) -> str:
    """The text as far as the terminal can show it: no control character but newline and tab, no character it lacks."""
    clean = "".join(c for c in text if c in "\n\t" or c.isprintable()) if sys.stdout.isatty() else text
    encoding = sys.stdout.encoding or "utf-8"
    return clean.encode(encoding, "replace").decode(encoding)


def _many(generator: Any, source: str, decoding: Decoding, batch_size: int) -> None:
    from vlm.cli.output import echo_json
    from vlm.cli.streams import batches

    failed = total = 0
    for lines in batches(_lines(source), batch_size):
        for row in _rows(generator, lines, total, decoding):
            failed += "error" in row
            echo_json(row, line=True)
        total += len(lines)
    if failed:
        click.echo(f"{failed} of {total} requests could not be answered; their lines say why", err=True)
        sys.exit(int(ExitCode.WRONG_DATA))


def _lines(source: str) -> Iterator[bytes]:
    """The lines of a file or of stdin; longer ones than other commands read, for pictures inside."""
    try:
        file = sys.stdin.buffer if source == "-" else open(source, "rb")  # noqa: SIM115 - stdin stays open
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=source, remedy="give a file, or - for stdin") from error
    with contextlib.nullcontext() if source == "-" else file:
        for number in itertools.count(1):
            line = file.readline(_MAX_LINE + 1)
            if not line:
                return
            if len(line) > _MAX_LINE:
                raise DataError(f"longer than {_MAX_LINE} bytes", where=f"{source}:{number}", remedy="expected one request a line")
            yield line


def _rows(generator: Any, lines: Sequence[bytes], first: int, decoding: Decoding) -> Iterator[dict[str, Any]]:
    """A row a line, in order; those that can be answered are, together."""
    made = [_attempt(generator, line, decoding) for line in lines]
    good = [(i, prompt) for i, (_, prompt) in enumerate(made) if not isinstance(prompt, DataError | RequestError)]
    # Draws hang on the number of the line, so that the batch size changes nothing.
    answers = dict(
        zip((i for i, _ in good), _answers(generator, [p for _, p in good], decoding, [f"line {first + i}" for i, _ in good]))
    )
    for i, (carried, prompt) in enumerate(made):
        if isinstance(prompt, DataError | RequestError):
            said = f"{prompt.where}: {prompt.message}" if prompt.where else prompt.message
            yield {**carried, "error": said}
        else:
            yield {**carried, **_row(generator, prompt, answers[i])}


def _attempt(generator: Any, line: bytes, decoding: Decoding) -> tuple[dict[str, Any], Any]:
    """(what the answer carries: the request's `id`, if it has one; its prompt, or why there is none)."""
    from vlm.runtime.generation.task import plan

    carried: dict[str, Any] = {}
    try:
        request = read_request(line)
        carried = {key: request[key] for key in ("id",) if key in request}
        messages, pictures = asked_of(request)
        if pictures:
            _reads_pictures(generator)
        prompt: Prompt = generator.prompt(messages, [generator.prepare_image(picture) for picture in pictures])
        plan(generator, [prompt], decoding, None, generator.negatives)  # too long by itself: it must not end the others
    except (DataError, RequestError) as error:
        return carried, error
    return carried, prompt


def _answers(generator: Any, prompts: Sequence[Prompt], decoding: Decoding, keys: Sequence[str]) -> list[Completion]:
    from vlm.runtime.generation import generate

    return generate(generator, prompts, decoding, keys=keys, negatives=generator.negatives)


def _row(generator: Any, prompt: Prompt, answer: Completion) -> dict[str, Any]:
    return {
        "text": answer.text,
        "ids": list(answer.ids),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": generator.positions(prompt),
        "completion_tokens": len(answer.ids),
    }


def read_request(line: bytes) -> dict[str, Any]:
    """A line of --jsonl. Raises DataError for what is no JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError("expected a JSON object")
    return value


def asked_of(value: Mapping[str, Any]) -> tuple[list[Any], list[str | bytes]]:
    """A request as (messages, pictures as paths or bytes). Raises DataError that says what is wrong.

    {"prompt": text} or {"messages": [{"role", "content": text or parts}]}, pictures in `image`, or in the parts as
    {"type": "image_url", "image_url": {"url": data URI}}.
    """
    unknown = sorted(value.keys() - {"prompt", "messages", "image", "id"})
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}, expected prompt or messages, and image")
    if ("prompt" in value) == ("messages" in value):
        raise DataError("expected exactly one of prompt and messages")
    given = value.get("image", [])
    pictures = [_picture(entry) for entry in (given if isinstance(given, list) else [given])]
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise DataError("prompt is no text")
        messages = [user_message(value["prompt"], len(pictures))]
    else:
        messages, inside = _messages(value["messages"])
        if inside and pictures:
            raise DataError("pictures are either in image or in the messages")
        pictures = inside or pictures
    if len(pictures) > _MAX_PICTURES:
        raise DataError(f"{len(pictures)} pictures, at most {_MAX_PICTURES}")
    placed = sum(message.pictures for message in messages)
    if placed not in (0, len(pictures)):
        raise DataError(f"{placed} places for {len(pictures)} pictures")
    return messages, pictures


def user_message(text: str, pictures: int) -> Any:
    """What a user says. `<image>` marks the place of a picture where there are as many marks as pictures, else it is text."""
    from vlm.runtime.chat import Message, split_markers
    from vlm.runtime.pieces import IMAGE

    marked = pictures > 0 and text.count(IMAGE) == pictures
    return Message("user", split_markers(text) if marked else (text,))


def _messages(given: Any) -> tuple[list[Any], list[str | bytes]]:
    from vlm.runtime.chat import Message, PicturePart

    if not isinstance(given, list) or not given:
        raise DataError("messages is no list of messages")
    messages: list[Any] = []
    pictures: list[str | bytes] = []
    for i, message in enumerate(given):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"messages.{i}: expected role and content")
        content = message.get("content")
        parts: list[str | PicturePart] = []
        for part in [content] if isinstance(content, str) else content if isinstance(content, list) else [None]:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            elif isinstance(part, dict) and kind == "image_url":
                url = part.get("image_url")
                pictures.append(_picture(url.get("url") if isinstance(url, dict) else url))
                parts.append(PicturePart())
            else:
                raise DataError(f"messages.{i}: expected a text, or parts of type text and image_url")
        messages.append(Message(message["role"], tuple(parts)))
    return messages, pictures


def _picture(entry: Any) -> str | bytes:
    """A path, or the bytes of a data URI. Nothing is fetched."""
    if not isinstance(entry, str) or not entry:
        raise DataError("image is no path and no data URI")
    if not entry[:5].lower().startswith("data:"):
        if "://" in entry[:12]:
            raise DataError("nothing is fetched: give a path or a data URI")
        return entry
    import base64
    import binascii

    head, comma, data = entry.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError("expected data:MIME;base64,DATA")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("a data URI is not valid base64") from None
