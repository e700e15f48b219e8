"""Objects that a text names, and those among them that the picture does not show.

Sources: Rohrbach et al., "Object hallucination in image captioning" (the rate per mention and per caption); povid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm.evaluation.text_metrics.words import words


def plural(name: str) -> str:
    """The regular English plural: circles, crosses, puppies."""
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2:-1] not in ("", "a", "e", "i", "o", "u"):
        return name[:-1] + "ies"
    return name + "s"


@dataclass(frozen=True)
class ObjectNames:
    """Surface forms as words -> the object they name."""

    forms: Mapping[tuple[str, ...], str]
    longest: int

    @classmethod
    def of(cls, names: Iterable[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> ObjectNames:
        """Each name with its regular plural, and its synonyms. A name without a word is left out."""
        forms: dict[tuple[str, ...], str] = {}
        for name in names:
            for form in (name, *(synonyms or {}).get(name, ())):
                for spelled in (form, plural(form)):
                    if tokens := tuple(words(spelled)):
                        forms.setdefault(tokens, name)
        return cls(forms, max(map(len, forms), default=0))

    def named(self, text: str) -> list[str]:
        """The objects that a text names, one entry a mention. The longest name wins: "red circle" is no "circle"."""
        tokens = words(text)
        out, at = [], 0
        while at < len(tokens):
            for size in range(min(self.longest, len(tokens) - at), 0, -1):
                found = self.forms.get(tuple(tokens[at : at + size]))
                if found is not None:
                    out.append(found)
                    at += size
                    break
            else:
                at += 1
        return out


def hallucination_statistics(
    named: Sequence[Sequence[str]], present: Sequence[Collection[str]]
) -> NDArray[np.float64]:
    """[n, 5] mentions of absent objects, mentions, 1 where the text has an absent one, 1, objects rightly named once.

    named: of each text, as `ObjectNames.named` gives them; present: what each picture shows.
    """
    out = np.zeros((len(named), 5))
    for i, (mentions, shown) in enumerate(zip(named, present, strict=True)):
        absent = sum(name not in shown for name in mentions)
        out[i] = absent, len(mentions), absent > 0, 1, len({name for name in mentions if name in shown})
    return out


def absent_rate(named: Sequence[Sequence[str]], present: Sequence[Collection[str]]) -> float:
    """Mentions of objects that are not there / mentions of objects; 0 where no object is named."""
    absent, mentions = hallucination_statistics(named, present)[:, :2].sum(0)
    return float(absent / mentions) if mentions else 0.0
