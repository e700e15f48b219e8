"""The central types: what data, models, objectives and the trainer say to each other.

They know no model family and no method. `docs/design/types.md` shows each with the method that stretched it most.
The names are imported when they are asked for: the runtime and data workers use `vlm.types.random` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.types.batch import Batch, Boxes, Features, Labels, Pictures, Role, Stream, TokenIds
    from vlm.types.communicator import Communicator, SingleProcess
    from vlm.types.layout import Layout
    from vlm.types.outputs import Outputs, Request, Views, Vocabulary
    from vlm.types.state import Stateful
    from vlm.types.terms import Context, Terms
    from vlm.types.vocabulary import VocabularyLayout

_PLACES = {
    "Batch": "batch",
    "Boxes": "batch",
    "Communicator": "communicator",
    "Context": "terms",
    "Features": "batch",
    "Labels": "batch",
    "Layout": "layout",
    "Outputs": "outputs",
    "Pictures": "batch",
    "Request": "outputs",
    "Role": "batch",
    "SingleProcess": "communicator",
    "Stateful": "state",
    "Stream": "batch",
    "Terms": "terms",
    "TokenIds": "batch",
    "Views": "outputs",
    "Vocabulary": "outputs",
    "VocabularyLayout": "vocabulary",
}

__all__ = [
    "Batch",
    "Boxes",
    "Communicator",
    "Context",
    "Features",
    "Labels",
    "Layout",
    "Outputs",
    "Pictures",
    "Request",
    "Role",
    "SingleProcess",
    "Stateful",
    "Stream",
    "Terms",
    "TokenIds",
    "Views",
    "Vocabulary",
    "VocabularyLayout",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"vlm.types.{_PLACES[name]}"), name)
