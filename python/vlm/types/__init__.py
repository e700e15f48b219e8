"""The central types: what data, models, objectives and the trainer say to each other.

They know no model family and no method. `docs/design/types.md` shows each with the method that stretched it most.
"""

from vlm.types.batch import Batch, Boxes, Features, Labels, Pictures, Role, Stream, TokenIds
from vlm.types.communicator import Communicator, SingleProcess
from vlm.types.layout import Layout
from vlm.types.outputs import Outputs, Request, Views, Vocabulary
from vlm.types.state import Stateful
from vlm.types.terms import Context, Terms
from vlm.types.vocabulary import VocabularyLayout

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
