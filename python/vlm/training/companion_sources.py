"""Where the companions of a stage come from. They are made when an objective first looks at them, and only those that
one names are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from vlm.config.errors import RequestError, VlmError
from vlm.data.tokenizer import Tokenizer
from vlm.models import Model, load_model
from vlm.models.directory import find_model_directory
from vlm.training.companion_options import CompanionOptions, ThreeWayUpdate
from vlm.training.companions import Companion, Companions
from vlm.tuning import has_adapters, load_merged
from vlm.types import Request

State = Mapping[str, Tensor]
T = TypeVar("T")


def _no_stage(name: str) -> Model:
    raise RequestError(f"there is no stage {name!r} before this one")


def check_sources(options: Mapping[str, CompanionOptions]) -> None:
    """Raises CheckpointError, before any data are read, for a companion whose model directory is not there."""
    for name, table in options.items():
        if table.source != "model" and table.stage is None:
            _named(name, find_model_directory, table.source)


@dataclass
class CompanionSources(Mapping[str, Model]):
    """The companions that a stage may have, by name; looking one up makes it.

    model: the run's model as the stage begins. kept: weights, without adapters, of copies that an earlier stage took for
    the whole run. of_stage: the model with the final weights of an earlier stage, RequestError for any other name.
    tokenizer: of the run, None where it reads no text.
    """

    options: Mapping[str, CompanionOptions]
    model: Model
    cache_folder: Path | None = None
    kept: Mapping[str, State] = field(default_factory=dict)
    of_stage: Callable[[str], Model] = _no_stage
    tokenizer: Tokenizer | None = None
    made: dict[str, Companion] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Model:
        if name not in self.made:
            self.made[name] = self._make(name, self.options[name])
        return self.made[name].model

    def __contains__(self, name: object) -> bool:  # Mapping would make it to see whether it is there
        return name in self.options

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)

    def companions(self, requests: Mapping[str, Sequence[Request]], note: Callable[[str], None]) -> Companions:
        """Those that the objectives (name -> requests) ask, and those that these move with.

        Raises RequestError, naming the objective, for one that no table describes.
        """
        wanted: set[str] = set()
        for objective, asked in requests.items():
            for request in asked:
                if request.companion != "model" and request.companion not in self.options:
                    raise RequestError(
                        f"objective {objective!r} asks for {request}, and there is no companion {request.companion!r}",
                        remedy=f"add a table [companions.{request.companion}]",
                    )
                wanted.add(request.companion)
        updates = [table.update for name, table in self.options.items() if name in wanted]
        wanted |= {update.with_ for update in updates if isinstance(update, ThreeWayUpdate)}
        for name in self.options:
            if name in wanted:
                self[name]
            else:
                note(f"companion {name!r} is not made: no objective of this stage asks for it")
        out = Companions([self.made[name] for name in self.options if name in wanted])
        out.check(self.model)
        return out

    def _make(self, name: str, table: CompanionOptions) -> Companion:
        """Load or copy one. Raises CheckpointError for a source that cannot be read; draws nothing."""
        if table.adapter is not None and not has_adapters(self.model):
            raise RequestError(
                f'companion {name!r} has adapter = "off", and the model has no adapters in this stage',
                remedy="set tuning.lora, or leave adapter out",
            )
        with torch.random.fork_rng(devices=[]):
            if table.live:
                model = self.model
            elif table.source == "model":
                model = copy.deepcopy(self.model)
                if table.refresh == "run" and name in self.kept:
                    load_merged(model, self.kept[name])
            elif table.stage is not None:
                model = _named(name, self.of_stage, table.stage)
            else:
                model = _named(name, load_model, table.source)
        return Companion(
            name,
            model,
            table.update,
            copied=table.copied,
            live=table.live,
            adapter_off=table.adapter is not None,
            lasting=table.copied and table.refresh == "run",
            cache_folder=self.cache_folder if table.cache else None,
            foreign=self._foreign(table),
        )

    def _foreign(self, table: CompanionOptions) -> Path | None:
        """The directory of a companion from elsewhere whose tokenizer gives texts other ids than the run's, or cannot be read."""
        if self.tokenizer is None or table.source == "model" or table.stage is not None:
            return None
        folder = find_model_directory(table.source)
        if not (folder / "tokenizer.json").is_file():
            return None
        try:
            return None if Tokenizer.load(folder).agrees(self.tokenizer) else folder
        except VlmError:  # it may still be asked for pictures
            return folder


def _named(name: str, load: Callable[[str], T], source: str) -> T:
    """What `load` gives, with errors that say which companion they are about."""
    try:
        return load(source)
    except VlmError as error:
        raise type(error)(f"companion {name!r}: {error.message}", where=error.where, remedy=error.remedy) from error
