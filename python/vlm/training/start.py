"""How a run comes by its model: tokenizer and architecture once a run, and the weights that the first stage begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlm.config.errors import RequestError, VlmError
from vlm.data.loader import open_split
from vlm.data.texts import field_values
from vlm.data.tokenizer import Tokenizer
from vlm.data.tokenizer_options import build_tokenizer
from vlm.models import Model, load_model
from vlm.models.directory import find_model_directory
from vlm.training.directory import Note, RunDirectory
from vlm.training.preset import Stage
from vlm.tuning import with_prompt
from vlm.types import Communicator, VocabularyLayout
from vlm.types.random import draw_key


@dataclass(frozen=True)
class Start:
    """The beginning of the run in `directory`."""

    directory: RunDirectory
    communicator: Communicator
    note: Note

    def tokenizer(self, stage: Stage) -> Tokenizer | None:
        """The run's tokenizer, None for a model that reads no text.

        The first call of a run also writes the architecture: rank 0 writes, the others wait and read.
        """
        own = self.directory.architecture
        if not (own / "vlm.json").is_file():
            if self.communicator.rank == 0:
                tokenizer, model = self._prompted(stage, *self._design(stage))
                self.directory.write_architecture(model, tokenizer, model.preprocess())
            self.communicator.barrier()
        return Tokenizer.load(own) if (own / "tokenizer.json").is_file() else None

    def model(self, stage: Stage, tokenizer: Tokenizer | None, *, initial: bool) -> Model:
        """The model of the run; with `initial` its first weights, otherwise any.

        Raises CheckpointError and RequestError for a source that cannot be read or does not fit.
        """
        if not initial:
            return load_model(self.directory.architecture, weights=False)
        parts = self._parts(stage, weights=True)
        if stage.start.model is not None:
            model = load_model(stage.start.model, changes=stage.start.settings)
            # The tokenizer has the prompt's tokens already, and with them nothing that the prompt begins with is other.
            model = self._prompted(stage, tokenizer, model)[1]
        else:
            options = self._options(stage, parts)
            torch.manual_seed(draw_key(stage.train.seed, "init"))
            model = options.build(vocabulary_of(tokenizer, special_tokens_of(options)))
        for name, source in parts.items():
            with _named(stage, name):
                model.take_part(name, source)
        return model

    def _prompted(self, stage: Stage, tokenizer: Tokenizer | None, model: Model) -> tuple[Tokenizer | None, Model]:
        """Tokenizer and model with a learned prompt, where the stage has one, begun anew. Raises RequestError where none can be."""
        options = stage.tuning.prompt
        if options is None:
            return tokenizer, model
        if stage.start.model is None or tokenizer is None:
            raise RequestError("tuning.prompt learns the words of a trained dual encoder", remedy="give --model DIR, or set start.model")
        classes: list[str] = []
        if options.per_class:
            if stage.data.label is None:
                raise RequestError("tuning.prompt.per_class: whose vectors?", remedy="set data.label, the field with a sample's class")
            classes = field_values(open_split(stage.data, "train", stage.train.seed), stage.data, stage.data.label)
        prompted, longer = with_prompt(model, tokenizer, options, classes, seed=draw_key(stage.train.seed, "prompt"))
        return longer, prompted

    def _design(self, stage: Stage) -> tuple[Tokenizer | None, Model]:
        """Tokenizer and architecture, from the model to start from or from the preset and the parts that it names."""
        if stage.start.model is not None:
            folder = find_model_directory(stage.start.model)
            model = load_model(folder, weights=False, changes=stage.start.settings)
            return Tokenizer.load(folder) if reads_text(model.options) else None, model
        options = self._options(stage, self._parts(stage, weights=False))
        if not reads_text(options):
            return None, options.build(vocabulary_of(None))
        text_part = getattr(options, "text_part", None)
        if text_part in stage.start.parts:
            with _named(stage, text_part):
                tokenizer = Tokenizer.load(find_model_directory(stage.start.parts[text_part]))
        else:
            tokenizer = build_tokenizer(stage.tokenizer, stage.data, open_split(stage.data, "train"), max_length=options.text_length)
        special = special_tokens_of(options)
        tokenizer = tokenizer.with_special(special) if special else tokenizer
        self.note(f"tokenizer: {tokenizer.vocab_size} ids")
        return tokenizer, options.build(vocabulary_of(tokenizer, special))

    def _options(self, stage: Stage, parts: dict[str, Model]) -> Any:
        """The model table with what the parts bring, from its `with_parts` (`VisionLanguageShape` shows one); others stay as they are."""
        if stage.model is None:
            raise RequestError("this preset brings no model", remedy="give --model DIR, a run or a Hugging Face directory")
        with_parts = getattr(stage.model, "with_parts", None)
        if not parts or with_parts is None:
            return stage.model
        try:
            return with_parts(parts)
        except ValueError as error:
            raise RequestError(f"start.parts does not fit this model: {error}") from error

    def _parts(self, stage: Stage, *, weights: bool) -> dict[str, Model]:
        found = {}
        for name, path in stage.start.parts.items():
            with _named(stage, name):
                found[name] = load_model(path, weights=weights)
        return found


class _named:
    """Errors inside the block say which entry of `start.parts` they are about."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.entry = f"start.parts.{name} = {stage.start.parts[name]}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, VlmError):
            message = f"{error.where}: {error.message}" if error.where else error.message
            raise type(error)(message, where=self.entry, remedy=error.remedy) from error


def special_tokens_of(options: Any) -> tuple[str, ...]:
    """Special tokens that a family wants; most want none and do not say so."""
    return tuple(getattr(options, "special_tokens", ()))


def reads_text(options: Any) -> bool:
    """Whether a model of these options reads texts, so that its run has a tokenizer."""
    return getattr(options, "text_length", None) is not None


def vocabulary_of(tokenizer: Tokenizer | None, special_tokens: tuple[str, ...] = ()) -> VocabularyLayout:
    """No span without a tokenizer; else one text span and the special ids that models ask for: bos, eos, pad, and `<image>` as `image`."""
    if tokenizer is None:
        return VocabularyLayout({}, {})
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    special |= {token.strip("<|>"): tokenizer.token_to_id(token) for token in special_tokens}
    return VocabularyLayout.of_text(tokenizer.vocab_size, {name: i for name, i in special.items() if i is not None})
