"""Numbers and names as a reader wants them."""

from __future__ import annotations

import math
from html import escape

from vlm.evaluation.table import number

__all__ = ["count", "duration", "escape", "label", "number", "span"]

_LABELS = {
    "image_to_text": "picture → text",
    "text_to_image": "text → picture",
    "r@1": "first place",
    "r@5": "among 5",
    "r@10": "among 10",
    "top1": "top 1",
    "top5": "top 5",
    "mean_per_class": "mean over classes",
    "accuracy_answered": "right where it answered",
    "accuracy_with_none": "right, “none” included",
    "none_recall": "strangers refused",
    "bits_per_character": "bits per character",
    "bits_per_byte": "bits per byte",
    "bits_per_token": "bits per token",
    "nats_per_token": "nats per token",
    "exact": "right",
    "same_answer": "the same answer",
    "same_token": "the same token",
    "yes_no": "yes or no",
    "f1": "F1",
    "yes_rate": "share of yes",
    "calibration_error": "calibration error",
    "cider": "CIDEr",
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "absent_object_rate": "absent among objects named",
    "captions_with_absent": "captions with an absent one",
    "mentions": "objects named in a caption",
    "objects_named": "of them there",
    "none": "no picture",
    "shuffled": "another picture",
    "prompt_positions": "positions of the prompt",
    "picture_positions": "of them the picture's",
    "visual_tokens": "visual tokens",
    "prefill_flops": "operations to the first token",
    "vision_flops": "of them vision",
    "decoder_flops": "of them decoder",
    "step_flops": "operations of a further token",
    "cache_bytes": "cache after the prompt",
    "share_of_full_prefill": "share of the layers' full work",
    "time_to_first_token": "time to the first token",
    "mean_time_to_first_token": "mean time to the first token",
    "tokens_per_second": "tokens a second",
    "mean_tokens_per_second": "mean tokens a second",
}


def label(name: str) -> str:
    """A metric's or series' name in words."""
    return _LABELS.get(name, name.replace("_", " "))


def count(value: float | None) -> str:
    """1234 -> 1,234; 5_200_000 -> 5.2 million."""
    if value is None:
        return "unknown"
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """3725 -> 1 h 2 min."""
    if seconds < 1:
        return "under a second" if seconds > 0 else "no time logged"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours / 24:.1f} days"


def span(low: float, high: float) -> tuple[list[float], float]:
    """Round ticks over a range, and their distance. Ends that are equal, or nearly, are widened."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0], 1.0
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-280):  # finer than the numbers themselves
        pad = abs(low) * 0.5 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)], step


def tick(value: float, step: float) -> str:
    """A tick's number with just enough digits."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(step) < 2e-3:
        return (
            f"{value:.3e}".replace("e-0", "e-")
            .replace("e+0", "e")
            .replace("000e", "e")
            .replace("00e", "e")
            .replace(".e", "e")
        )
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    return f"{value:,.{digits}f}"
