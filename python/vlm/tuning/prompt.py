"""A learned prompt: vectors at the input of a frozen text tower, in place of the words around a class name.

M vectors of a row, C width, K classes. Only the vectors learn; the gradient passes through the tower. What is saved has no
names of classes, unless each class has vectors of its own. Source: coop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vlm.config.errors import RequestError
from vlm.config.options import Options
from vlm.data.tokenizer import Tokenizer
from vlm.models import Model
from vlm.models.context import ContextOptions
from vlm.models.dual_encoder import DualEncoder, DualEncoderOptions
from vlm.runtime.prompt import LearnedPrompt

CONTEXT = "text.prompt.vectors"
"""The parameter that a prompt adds to a model."""
SPAN = "prompt"


class NormalInit(Options):
    """Every number of every vector drawn by itself."""

    kind: Literal["normal"] = "normal"
    std: float = Field(0.02, gt=0, description="standard deviation")


class TextInit(Options):
    """The vectors of words: the prompt begins as this text."""

    kind: Literal["text"] = "text"
    text: str = Field(min_length=1, description='words before the class name, such as "a photo of a"')


Init = Annotated[NormalInit | TextInit, Field(discriminator="kind")]


class PromptOptions(Options):
    """M vectors around the name of a class, shared by all classes or of each class alone."""

    at: Literal["text-input"] = Field("text-input", description="where the vectors stand: before the first block of the text tower")
    length: int | None = Field(None, ge=1, le=4096, description="vectors, M; default: 16, or as many as init.text has tokens")
    per_class: bool = Field(False, description="each class has its own vectors, which then serve no other class")
    position: Literal["end", "middle", "front"] = Field("end", description="where the class name stands among the vectors")
    ending: str = Field(".", description="what closes the text")
    init: Init = NormalInit()

    @model_validator(mode="after")
    def _words_before_the_name(self) -> PromptOptions:
        if isinstance(self.init, TextInit) and self.position == "front":
            raise ValueError('init.text says words before the class name, and position = "front" has none there')
        return self


def prompt_of_options(options: PromptOptions, tokenizer: Tokenizer, classes: Sequence[str]) -> LearnedPrompt:
    """The prompt's shape. classes: labels, read where each has its own vectors. Raises RequestError for a length that is not the text's."""
    length = options.length or 16
    if isinstance(options.init, TextInit):
        words = len(_words(options.init, tokenizer))
        length = options.length or words
        if length != words:
            raise RequestError(
                f"tuning.prompt.length is {length}, and init.text {options.init.text!r} has {words} tokens", remedy="leave length out"
            )
    return LearnedPrompt(length, options.position, options.ending, tuple(classes) if options.per_class else ())


def with_prompt(
    model: Model, tokenizer: Tokenizer, options: PromptOptions, classes: Sequence[str], *, seed: int
) -> tuple[DualEncoder, Tokenizer]:
    """The model with vectors of a prompt at its text input, and the tokenizer with the special tokens that stand for them.

    Its other weights, and what it makes of any text without these tokens, are unchanged. seed: of the first draw. Raises
    RequestError for a model of another family, for one that has a prompt, and where prompt and one token do not fit.
    """
    if not isinstance(model, DualEncoder):
        raise RequestError(f"tuning.prompt is for dual encoders, this is a {model.kind} model")
    if model.text.prompt is not None:
        remedy = f'train that one on: tuning.train = ["{CONTEXT}"] instead of tuning.prompt'
        raise RequestError("this model has learned a prompt already", remedy=remedy)
    learned = prompt_of_options(options, tokenizer, classes)
    longer = tokenizer.with_special(learned.tokens, strip=True)
    ids = [longer.token_to_id(token) for token in learned.tokens]
    first = ids[0]
    assert first is not None
    if ids != list(range(first, first + len(ids))):
        raise RequestError("the tokenizer knows some words of a prompt already", remedy="start from the model as it was before its prompt")
    shape = ContextOptions(
        length=learned.length, position=learned.position, ending=learned.ending, classes=learned.classes, first_id=first
    )
    taken, text_length = len(longer.ids([learned.template().replace("{}", "a")])[0]), model.options.text.length
    if taken > text_length:
        raise RequestError(
            f"a prompt of {learned.length} vectors takes {taken} of {text_length} positions with a name of one token",
            remedy="shorten tuning.prompt.length",
        )
    made = _rebuilt(model, shape, max(0, longer.vocab_size - model.vocabulary.size))
    with torch.no_grad():
        vectors = made.get_parameter(CONTEXT)
        vectors.copy_(_first(options.init, model, tokenizer, vectors, seed))
    return made, longer


def _rebuilt(model: DualEncoder, shape: ContextOptions, added: int) -> DualEncoder:
    """The same model with room for the vectors; added: ids that its vocabulary lacks."""
    given = model.options
    text = given.text.model_copy(update={"prompt": shape})
    options: DualEncoderOptions = given.model_copy(update={"text": text})
    made = options.build(model.vocabulary.extend(SPAN, added) if added else model.vocabulary)
    state: dict[str, Any] = {**model.state_dict(), CONTEXT: made.state_dict()[CONTEXT]}
    made.load_state_dict(state)
    return made


def _words(init: TextInit, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.ids([init.text], add_special=False)[0]


def _first(init: NormalInit | TextInit, model: DualEncoder, tokenizer: Tokenizer, like: Tensor, seed: int) -> Tensor:
    """The first vectors, of the shape of `like`: [M, C] or [K, M, C]."""
    if isinstance(init, TextInit):
        return model.text.tokens.weight[torch.tensor(_words(init, tokenizer))].expand(like.shape)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * init.std
