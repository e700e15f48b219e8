"""What an answer costs: parameters, positions, operations and cache counted from shapes; time measured here.

L layers of the decoder. Source: pyramiddrop (cost by the positions that each layer keeps).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from vlm.config.errors import RequestError
from vlm.evaluation.bootstrap import bootstrap
from vlm.evaluation.flops import GeneratorShape, cache_bytes, generator_flops, prefill_flops, step_flops
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.result import Result, figures
from vlm.evaluation.shuffling import Control
from vlm.evaluation.writing import Ask, WritingTask, need, prompts_of

if TYPE_CHECKING:
    from vlm.runtime.generation import Prompt


@runtime_checkable
class Shaped(Protocol):
    """A generator that knows its shapes; without them only positions and time can be told."""

    def shape(self) -> GeneratorShape:
        """Parameters, towers and decoder."""
        ...

    def kept(self, prompt: Prompt) -> Sequence[int]:
        """[L] positions that each layer of the decoder reads of a prompt, after its pictures are expanded."""
        ...


class CostOptions(WritingTask):
    """The cost of one prompt with one picture, and of the tokens after it, one row at a time."""

    task: Literal["cost"] = "cost"
    limit: int | None = Field(8, gt=0, description="pictures to measure, drawn from the data")
    controls: tuple[Control, ...] = Field((), max_length=0, description="has no controls")
    decoding: dict[str, Any] = Field({}, max_length=0, description="is always greedy")
    prompt: str = Field("Describe the picture.", min_length=1, description="what the user says")
    max_new_tokens: int = Field(16, ge=1, description="tokens written after each prompt, end tokens ignored")
    repeats: int = Field(3, ge=1, le=100, description="measurements of each prompt, of which the fastest counts")

    def run(self, samples: Pictured, batch: int) -> Result:
        return cost(samples, self)


def cost(samples: Pictured, options: CostOptions) -> Result:
    """Figures under `counted` (from shapes, exact) and `measured` (on this machine, with its threads).

    time_to_first_token: seconds from prepared pictures to the first token; tokens_per_second: of those after it, over
    max_new_tokens greedy steps; both medians over prompts.
    """
    need(len(samples), "no picture", "see what the data hold with: vlm data inspect URI")
    generator: Any = samples.generator
    asks = [Ask(i, options.prompt) for i in range(len(samples))]
    prompts = prompts_of(samples, asks, np.arange(len(samples)))
    blind = prompts_of(samples, asks[:1], None)[0]
    positions = [int(generator.positions(prompt)) for prompt in prompts]
    if max(positions) + options.max_new_tokens > generator.length:
        raise RequestError(
            f"the prompt takes {max(positions)} positions and the answer {options.max_new_tokens}, the model has {generator.length}",
            remedy="give a smaller --max-new-tokens, or a shorter --prompt",
        )
    counted: dict[str, Any] = {
        "prompt_positions": float(np.mean(positions)),
        "picture_positions": float(np.mean(positions)) - int(generator.positions(blind)),
    }
    details: dict[str, Any] = {"prompt": options.prompt, "new_tokens": options.max_new_tokens}
    if isinstance(generator, Shaped):
        parts, said = _from_shapes(generator.shape(), generator, prompts)
        counted |= parts
        details |= said
    else:
        details["shapes"] = "not known for this model: parameters, operations and cache are not counted"
    timed = [_measure(generator, prompt, options) for prompt in prompts]
    first = np.array([t[0] for t in timed])
    rate = np.array([t[1] for t in timed])
    measured = {"time_to_first_token": round(float(np.median(first)), 6)}
    columns, names = [first], ["mean_time_to_first_token"]
    if options.max_new_tokens > 1:
        measured["tokens_per_second"] = round(float(np.median(rate)), 4)
        columns.append(rate)
        names.append("mean_tokens_per_second")
    estimate = bootstrap(np.stack(columns, axis=1), resamples=options.resamples, seed=options.seed)
    means, intervals = figures(names, estimate)
    details["measured"] = f"the fastest of {options.repeats} runs of each prompt, one row at a time, medians over prompts"
    return Result(
        task="cost",
        name=options.title,
        samples=len(samples),
        metrics={"counted": counted, "measured": measured | means},
        intervals={"measured": intervals},
        chance={},
        details=details,
    )


def _from_shapes(
    shape: GeneratorShape, generator: Shaped, prompts: Sequence[Prompt]
) -> tuple[dict[str, Any], dict[str, Any]]:
    kept = np.array([list(generator.kept(prompt)) for prompt in prompts], dtype=np.int64)
    streams = [{name: len(pictures) for name, pictures in prompt.pictures.items()} for prompt in prompts]
    operations = [generator_flops(shape, s, k.tolist()) for s, k in zip(streams, kept)]
    full = [prefill_flops(shape.decoder, [int(k[0])] * shape.decoder.depth) for k in kept]
    steps = [step_flops(shape.decoder, k.tolist(), shape.vocab_size) for k in kept]
    cache = [cache_bytes(shape.decoder, k.tolist(), shape.cache_bytes_per_value) for k in kept]
    decoder = np.mean([prefill_flops(shape.decoder, k.tolist()) for k in kept])

    def mean(values: Sequence[int]) -> float:
        return round(float(np.mean(values)), 3)

    counted: dict[str, Any] = {
        "parameters": int(sum(shape.parameters.values())),
        "visual_tokens": mean([sum(shape.visual_tokens.get(name, 0) * n for name, n in s.items()) for s in streams]),
        "prefill_flops": mean([o["total"] for o in operations]),
        "vision_flops": mean([o["vision"] for o in operations]),
        "decoder_flops": mean([o["decoder"] for o in operations]),
        "step_flops": mean(steps),
        "cache_bytes": mean(cache),
        # Of the layers alone: 1 where no position is dropped.
        "share_of_full_prefill": round(float(decoder / np.mean(full)), 6),
    }
    said: dict[str, Any] = {
        "parameters": dict(shape.parameters),
        "positions_by_layer": [round(float(v), 3) for v in kept.mean(0)],
    }
    return counted, said


def _measure(generator: Any, prompt: Prompt, options: CostOptions) -> tuple[float, float]:
    """(seconds to the first token, tokens a second after it), each the best of the repeats."""
    first, rate = np.inf, 0.0
    for _ in range(options.repeats):
        stepper = generator.stepper()
        begin = time.perf_counter()
        token = stepper.start([prompt]).argmax(axis=-1).astype(np.int64)
        read = time.perf_counter()
        for _ in range(options.max_new_tokens - 1):
            token = stepper.advance(token).argmax(axis=-1).astype(np.int64)
        end = time.perf_counter()
        first = min(first, read - begin)
        if options.max_new_tokens > 1:
            rate = max(rate, (options.max_new_tokens - 1) / max(end - read, 1e-9))
    return first, rate
