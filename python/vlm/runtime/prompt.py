"""The prompt that a dual encoder has learned, as text: special tokens stand where the learned vectors go.

    <context> <context> <context> <context> red circle.

A text without these tokens is read as it was before the prompt was learned. Source: coop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm.config.errors import CheckpointError, RequestError

Position = Literal["end", "middle", "front"]


def plain_name(label: str) -> str:
    """`vehicles/fire_truck` -> `fire truck`: the last part of a path, with - and _ as spaces."""
    last = [part for part in label.split("/") if part.strip()]
    text = (last[-1] if last else label).replace("_", " ").replace("-", " ")
    return " ".join(text.split()) or label


def class_names(labels: Sequence[str]) -> dict[str, str]:
    """Label -> the name that a text says, in order. Where two labels share a plain name, both are named in full."""
    names = {label: plain_name(label) for label in labels}
    often = Counter(names.values())
    full = {label: " ".join(label.replace("/", " ").replace("_", " ").split()) for label in names}
    return {label: full[label] if often[name] > 1 else name for label, name in names.items()}


@dataclass(frozen=True)
class LearnedPrompt:
    """length: vectors of a row, M. position: where the class name stands among them. ending: what closes the text.

    classes: labels of the classes that have vectors of their own each, in the order of their rows; empty where all share M vectors.
    """

    length: int
    position: Position = "end"
    ending: str = "."
    classes: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """The special tokens: one, or one a class."""
        return tuple(f"<context.{i}>" for i in range(len(self.classes))) if self.classes else ("<context>",)

    def template(self, row: int = 0) -> str:
        """The text with {} where the name goes; row: of the class, where each has its own vectors."""
        words, half = [self.tokens[row]] * self.length, self.length // 2
        before, after = {"end": (words, []), "front": ([], words), "middle": (words[:half], words[half:])}[self.position]
        return " ".join([*before, "{}", *after]) + self.ending

    def text(self, name: str, label: str | None = None) -> str:
        """The text of a class, by its name; label: what the data call it, which says the row where each class has its own.

        Raises RequestError for a class without vectors.
        """
        if not self.classes:
            return self.template().replace("{}", name, 1)
        wanted = name if label is None else label
        row = self.row(wanted)
        if row is None:
            some = ", ".join(self.classes[:5])
            raise RequestError(
                f"the learned prompt has vectors for {len(self.classes)} classes, and {wanted!r} is none of them",
                remedy=f"give classes such as {some}, or a template without learned words, such as 'a photo of a {{}}.'",
            )
        return self.template(row).replace("{}", name, 1)

    def row(self, label: str) -> int | None:
        """The row of a class, by its label or its plain name; None where it has none."""
        if label in self.classes:
            return self.classes.index(label)
        names = [plain_name(one) for one in self.classes]
        return names.index(plain_name(label)) if names.count(plain_name(label)) == 1 else None

    def to_json(self) -> dict[str, Any]:
        return {"length": self.length, "position": self.position, "ending": self.ending, "classes": list(self.classes)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> LearnedPrompt | None:
        """What `to_json` gave; None for None. Raises CheckpointError for anything else."""
        if value is None:
            return None
        fits = (
            isinstance(value, Mapping)
            and isinstance(value.get("length"), int)
            and not isinstance(value["length"], bool)
            and 0 <= value["length"] <= 4096
            and value.get("position") in ("end", "middle", "front")
            and isinstance(value.get("ending"), str)
            and isinstance(value.get("classes"), list)
            and all(isinstance(label, str) for label in value["classes"])
        )
        if not fits:
            raise CheckpointError("text.prompt describes no learned prompt", where=where, remedy="export the model again with vlm export")
        return cls(value["length"], value["position"], value["ending"], tuple(value["classes"]))


def prompt_of(embedder: Any) -> LearnedPrompt | None:
    """The prompt that an embedder has learned, None for one that has none."""
    found = getattr(embedder, "prompt", None)
    return found if isinstance(found, LearnedPrompt) else None
