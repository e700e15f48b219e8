"""Commands that the page offers: what to do with this run next."""

from __future__ import annotations

import shlex

from vlm.reporting.record import RunRecord
from vlm.reporting.words import escape


def quoted(run: RunRecord) -> str:
    return shlex.quote(str(run.root))


def task_of(run: RunRecord) -> str:
    """The task that fits the run's model."""
    return {"language": "perplexity", "vision-language": "vqa"}.get(str(run.setting("model.kind")), "retrieval")


def command(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def next_steps(run: RunRecord) -> str:
    root = quoted(run)
    steps = []
    if not run.finished:
        steps.append(
            ("Go on where it stopped.", f"vlm {run.setting('method.command', 'pretrain')} --resume {root}")
        )
    elif task_of(run) == "vqa":
        steps += [
            ("Ask it about other pictures.", f"vlm evaluate {root} --task vqa --data questions.jsonl --save"),
            ("See what an answer costs.", f"vlm evaluate {root} --task cost --save"),
            ("Write an ONNX bundle that runs without torch.", f"vlm export {root} --output bundle"),
        ]
    elif task_of(run) == "perplexity":
        steps += [
            ("Measure it on other text.", f"vlm evaluate {root} --task perplexity --data texts.jsonl.gz"),
            ("Write an ONNX bundle that runs without torch.", f"vlm export {root} --output bundle"),
        ]
    else:
        steps += [
            (
                "Classify a picture of yours by names that you choose.",
                f'vlm predict {root} photo.jpg --labels "a cat,a dog,a bicycle"',
            ),
            (
                "Search your own pictures by text.",
                f"find photos -name '*.jpg' | vlm embed {root} --images - > photos.jsonl\n"
                f"vlm search {root} \"a red bicycle\" --index photos.jsonl",
            ),
            (
                "Measure it on other data.",
                f"vlm evaluate {root} --task zero-shot --data pictures/ --labels-from label --save",
            ),
            (
                "Write an ONNX bundle that runs without torch, and serve it.",
                f"vlm export {root} --output bundle\nvlm serve bundle",
            ),
        ]
    key = run.setting("method.key")
    if key:
        steps.append(
            (
                "Change one thing and compare.",
                f"vlm presets show {shlex.quote(str(key))} --resolved\nvlm runs compare {root} runs/other",
            )
        )
    return (
        '<ol class="next">'
        + "".join(f"<li><p>{escape(text)}</p>{command(line)}</li>" for text, line in steps)
        + "</ol>"
    )
