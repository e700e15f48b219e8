"""The templates that have a name. Source: llava-kd."""

from __future__ import annotations

from vlm.config.errors import DataError
from vlm.runtime.chat import Template, Turn


def _headed(role: str) -> Turn:
    return Turn(f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>" if role != "assistant" else "")


def _marked(role: str) -> Turn:
    return Turn(f"<|im_start|>{role}\n", "<|im_end|>\n" if role != "assistant" else "\n")


TEMPLATES: dict[str, Template] = {
    "plain": Template("plain", system=Turn(suffix="\n"), user=Turn(suffix="\n", bare=False)),
    "vicuna": Template(
        "vicuna",
        system=Turn(suffix=" "),
        user=Turn("USER: ", " "),
        assistant=Turn("ASSISTANT:"),
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        answer_lead=" ",
        after_picture="\n",
    ),
    "llama3": Template(
        "llama3",
        system=_headed("system"),
        user=_headed("user"),
        assistant=_headed("assistant"),
        end="<|eot_id|>",
        after_picture="\n",
    ),
    "chatml": Template(
        "chatml",
        system=_marked("system"),
        user=_marked("user"),
        assistant=_marked("assistant"),
        default_system="You are a helpful assistant.",
        bos=False,
        end="<|im_end|>",
        after_picture="\n",
    ),
}
"""plain: pictures, text, a newline if there is text, answer, eos: tiny and caption models. vicuna: LLaVA-1.5.
llama3: Llama 3. chatml: Qwen."""


def template_named(name: str) -> Template:
    """Raises DataError that names the known templates."""
    if name not in TEMPLATES:
        raise DataError(f"unknown template {name!r}", remedy=f"known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
