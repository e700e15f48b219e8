"""Examples that the evaluations stored: what it says, finds, answers, mixes up, and what surprises it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm.reporting.commands import command, quoted, task_of
from vlm.reporting.findings import confusion, gallery, surprise
from vlm.reporting.record import RunRecord
from vlm.reporting.words import escape, label
from vlm.reporting.written import said_gallery

_SAYS = {
    "vqa": "Questions about the evaluated pictures: as many wrong answers as right ones, where there are so many.",
    "grounding": "Objects asked for in the evaluated pictures: as many wrong boxes as right ones, where there are so many.",
    "localisation": "Phrases looked for among the patches of the evaluated pictures: as many missed as found, where there are so many.",
    "caption": "Captions of the evaluated pictures: in turns from the worse and the better half by CIDEr.",
    "hallucination": "Captions of the evaluated pictures: in turns with and without an object that is not there.",
}
"""How the examples of each task were chosen, which is not by success."""


def says(run: RunRecord) -> str:
    parts = []
    for result in run.results:
        task = str(result["task"])
        if task in _SAYS and (drawn := said_gallery(result)):
            name = str(result.get("name") or task)
            parts.append(f'<h3>{escape(label(name))}</h3><p class="soft">{_SAYS[task]}</p><div class="examples">{drawn}</div>')
    if not parts:
        return ""
    intro = (
        "Within each side they are the first ones of a random draw fixed by a seed: how often it is right is said by "
        "the figures above, not by this mixture."
    )
    return f'<p class="intro">{intro}</p>{"".join(parts)}'


def finds(run: RunRecord) -> str:
    out = []
    for result in run.results:
        if result["task"] != "retrieval":
            continue
        for direction, text in (
            (
                "text_to_image",
                "A caption, and the five pictures it lies nearest to. A ring marks a right one.",
            ),
            ("image_to_text", "A picture, and the five captions it lies nearest to, by cosine."),
        ):
            drawn = gallery(result, direction)
            if drawn:
                out.append(
                    f'<h3>{label(direction)}</h3><p class="soft">{text}</p><div class="examples">{drawn}</div>'
                )
    if not out:
        if task_of(run) != "retrieval":
            return ""
        return '<p class="intro">No examples are stored. This draws some:</p>' + command(
            f"vlm evaluate {quoted(run)} --task retrieval --save"
        )
    said = "These are the first ones of a random draw fixed beforehand by a seed, successes and failures as they came."
    return f'<p class="intro">{said}</p>{"".join(out)}'


def _each(run: RunRecord, task: str, draw: Callable[[dict[str, Any]], str], intro: str) -> str:
    parts = []
    for result in run.results:
        if result["task"] == task and (drawn := draw(result)):
            name = str(result.get("name", task))
            parts.append(f"<h3>{escape(name)}</h3>{drawn}" if name != task else drawn)
    return f'<p class="intro">{intro}</p>{"".join(parts)}' if parts else ""


def answers(run: RunRecord) -> str:
    def draw(result: dict[str, Any]) -> str:
        drawn = gallery(result, "zero-shot")
        return f'<div class="examples">{drawn}</div>' if drawn else ""

    return _each(
        run,
        "zero-shot",
        draw,
        "Pictures and the five class names they lie nearest to, by cosine; again as the seed drew them.",
    )


def mixes(run: RunRecord) -> str:
    return _each(
        run,
        "zero-shot",
        confusion,
        "Zero-shot answers by true class. The darker a cell off the diagonal, the more often that mistake is made.",
    )


def surprises(run: RunRecord) -> str:
    def draw(result: dict[str, Any]) -> str:
        drawn = surprise(result)
        return f'<div class="examples">{drawn}</div>' if drawn else ""

    return _each(
        run,
        "perplexity",
        draw,
        "Documents of the evaluated data, each token shaded by the bits it cost: dark is a surprise.",
    )
