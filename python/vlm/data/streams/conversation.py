"""From the fields of a sample to the messages of a conversation stream. Runs in workers and imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.boxes import box_text, seen_box
from vlm.data.captions import text_values
from vlm.data.corruption import corrupt
from vlm.data.samples import BadSample, clean_text, field_at
from vlm.data.streams.messages import messages_of
from vlm.data.streams.options import AnswerOptions, ConversationStream, Questions, Regions
from vlm.runtime.chat import Message
from vlm.runtime.preprocess import Preprocess

Box = tuple[float, float, float, float]
SeenBox = Callable[[Any], Box | None]


def whole(box: Any) -> Box | None:
    """The box itself, where no picture is prepared."""
    return seen_box(box, 1, 1, Preprocess(1, "squash"))


@dataclass(frozen=True)
class Said:
    """messages, and the addresses of pictures that they hold themselves.

    entries: what each answer came from: a message, a question, an object, or the sample.
    """

    messages: list[Message]
    addresses: list[Any]
    entries: list[Mapping[str, Any]]

    @property
    def answer(self) -> str:
        return self.messages[-1].text

    @property
    def answers(self) -> list[str]:
        return [message.text for message in self.messages if message.role == "assistant"]


class Conversations:
    """All conversation streams of a table, made together: one may answer with another's answer made wrong.

    columns: `[data.columns]` (a name that a stream reads may stand for another field). nouns: of each stream that is made
    wrong, for rule object. weights: stream -> kind -> answer -> weight, for `balance = "answers"`.
    """

    def __init__(
        self,
        streams: Mapping[str, ConversationStream],
        columns: Mapping[str, str],
        max_text: int,
        nouns: Mapping[str, list[str]] | None = None,
        weights: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    ) -> None:
        self.streams, self.columns, self.max_text = streams, columns, max_text
        self.nouns, self.weights = nouns or {}, weights or {}

    def make(self, fields: dict[str, Any], keys: Mapping[str, int], seen: SeenBox = whole) -> dict[str, Said]:
        """The conversation of each stream, each drawn from its own key.

        seen: a box of the stored picture -> what the model sees of it, or None. Raises BadSample.
        """
        return {name: self._one(name, fields, keys, seen) for name in self.streams}

    def _one(self, name: str, fields: dict[str, Any], keys: Mapping[str, int], seen: SeenBox) -> Said:
        stream = self.streams[name]
        generator = np.random.Generator(np.random.Philox(key=keys.get(name, 0)))
        addresses: list[Any] = []
        entries: list[Mapping[str, Any]]
        if stream.questions_table is not None:
            messages, entries = self._question(name, stream.questions_table, fields, generator)
        elif stream.regions_table is not None:
            messages, entries = self._region(stream.regions_table, fields, generator, seen)
        elif (answer := stream.answer_table) is not None:
            prompt = self._prompt(stream, fields, generator)
            said = self._answer(name, answer, fields, keys, generator, seen)
            messages = [Message("user", (prompt,) if prompt else ()), Message("assistant", (said,))]
            entries = [fields]
        else:
            column = stream.messages or "auto"
            messages, addresses, entries = messages_of(fields, self.columns.get(column, column), self.max_text)
        if stream.system is not None:
            messages = [Message("system", (stream.system,)), *(m for m in messages if m.role != "system")]
        return Said(messages, addresses, entries)

    def _values(self, fields: dict[str, Any], column: str) -> list[Any]:
        if column == "auto":
            return text_values(fields, self.columns.get("text", "auto"))
        value = field_at(fields, self.columns.get(column, column))
        return [] if value is None else list(value) if isinstance(value, list) else [value]

    def _drawn(self, values: list[Any], generator: np.random.Generator) -> str:
        return clean_text(values[int(generator.integers(len(values)))] if len(values) > 1 else values[0], self.max_text)

    def _prompt(self, stream: ConversationStream, fields: dict[str, Any], generator: np.random.Generator) -> str:
        prompt = stream.prompt
        if prompt is None:
            return ""
        if isinstance(prompt, str):
            values = self._values(fields, prompt)
            if not values:
                raise BadSample("missing_text", f"field {prompt}")
            return self._drawn(values, generator)
        texts = [prompt.literal] if isinstance(prompt.literal, str) else list(prompt.literal)
        return texts[int(generator.integers(len(texts)))] if len(texts) > 1 else texts[0]

    def _answer(
        self,
        name: str,
        table: AnswerOptions,
        fields: dict[str, Any],
        keys: Mapping[str, int],
        generator: np.random.Generator,
        seen: SeenBox,
    ) -> str:
        values = self._values(fields, table.column) if table.column is not None else []
        if values:
            return self._drawn(values, generator)
        if table.otherwise is None:
            raise BadSample("missing_text", f"field {table.column}")
        right = self._one(table.otherwise.of, fields, keys, seen).answer
        key = int(generator.integers(2**63))
        wrong = corrupt(right, table.otherwise.rules, key, self.nouns.get(table.otherwise.of, ()))
        if wrong is None:
            raise BadSample("no_corruption", repr(right[:80]))
        return wrong.text

    def _question(
        self, name: str, table: Questions, fields: dict[str, Any], generator: np.random.Generator
    ) -> tuple[list[Message], list[Mapping[str, Any]]]:
        by_kind: dict[str, list[Mapping[str, Any]]] = {}
        for kind, entry in asked_entries(fields, self.columns.get(table.column, table.column), table.kinds):
            by_kind.setdefault(kind, []).append(entry)
        if not by_kind:
            raise BadSample("no_question", f"field {table.column}" + (f", kinds {', '.join(table.kinds)}" if table.kinds else ""))
        weights = self.weights.get(name, {})
        left = [(kind, entry) for kind, entries in by_kind.items() for entry in entries]
        messages: list[Message] = []
        taken: list[Mapping[str, Any]] = []
        for _ in range(min(table.turns, len(left))):
            kinds = [kind for kind, _ in left]
            if table.balance == "kinds":
                shares = [1 / (len(set(kinds)) * kinds.count(kind)) for kind in kinds]
            elif table.balance == "answers":
                shares = [weights.get(kind, {}).get(entry["answer"], 1.0) for kind, entry in left]
            else:
                shares = [1.0] * len(left)
            edges = np.cumsum(shares)
            place = int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))
            _, entry = left.pop(min(place, len(left) - 1))
            messages.append(Message("user", (clean_text(entry["question"], self.max_text),)))
            messages.append(Message("assistant", (clean_text(entry["answer"], self.max_text),)))
            taken.append(entry)
        return messages, taken

    def _region(
        self, table: Regions, fields: dict[str, Any], generator: np.random.Generator, seen: SeenBox
    ) -> tuple[list[Message], list[Mapping[str, Any]]]:
        entries = self._values(fields, table.column)
        good = regions_of(entries, table, seen)
        if not good:
            raise BadSample("no_question", f"no object of {table.column} that is seen and named by its phrase alone")
        phrase, box, entry = good[int(generator.integers(len(good)))]
        question = table.prompt.replace("{phrase}", phrase)
        return [Message("user", (question,)), Message("assistant", (box_text(box, table.decimals),))], [entry]


def regions_of(entries: list[Any], table: Regions, seen: SeenBox) -> list[tuple[str, Box, Mapping[str, Any]]]:
    """(phrase, box as the model sees it, entry) of each object that is seen and named by its phrase alone. Raises BadSample."""
    names: list[str] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadSample("bad_box", f"field {table.column} holds a {type(entry).__name__}")
        names.append(fill(table.phrase, entry))
    good: list[tuple[str, Box, Mapping[str, Any]]] = []
    for entry, phrase in zip(entries, names):
        box = seen(field_at(entry, table.box))
        if box is not None and names.count(phrase) == 1:  # a phrase for two objects has no one answer
            good.append((phrase, box, entry))
    return good


def fill(phrase: str, entry: Mapping[str, Any]) -> str:
    """The phrase with `{field}` replaced by the entry's text. Raises BadSample when a field is missing."""
    out, rest = "", phrase
    while rest:
        before, opened, after = rest.partition("{")
        name, closed, rest = after.partition("}")
        out += before
        if opened and closed:
            value = entry.get(name)
            if not isinstance(value, str | int | float):
                raise BadSample("missing_field", name)
            out += str(value)
        else:
            out += opened + name
    return out


def asked(fields: dict[str, Any], column: str, kinds: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of the list in a field, of the kinds asked for. Raises BadSample when it is none."""
    return [(kind, entry["question"], entry["answer"]) for kind, entry in asked_entries(fields, column, kinds)]


def asked_entries(fields: dict[str, Any], column: str, kinds: tuple[str, ...]) -> list[tuple[str, Mapping[str, Any]]]:
    """The same as (kind, entry)."""
    value = field_at(fields, column)
    if value is None:
        raise BadSample("missing_field", column)
    if not isinstance(value, list):
        raise BadSample("bad_messages", f"field {column} holds a {type(value).__name__}, expected a list of questions")
    out: list[tuple[str, Mapping[str, Any]]] = []
    for entry in value:
        if not isinstance(entry, dict) or not isinstance(entry.get("question"), str) or not isinstance(entry.get("answer"), str):
            raise BadSample("bad_messages", f"field {column}: an entry without question and answer")
        kind = str(entry.get("kind", ""))
        if not kinds or kind in kinds:
            out.append((kind, entry))
    return out
