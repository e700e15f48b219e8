"""What a bundle is made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm.data.tokenizer import Tokenizer
from vlm.export.parity import Tolerance
from vlm.models import Model
from vlm.types.export import ExportPart


@dataclass(frozen=True)
class Source:
    """`model` is in evaluation mode on the CPU; directory: that of the model, from which files are copied."""

    model: Model
    directory: Path
    text: Tokenizer | None
    parts: dict[str, ExportPart]
    tolerance: Tolerance
    opset: int
    name: str

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a model that reads text."""
        assert self.text is not None
        return self.text

    @property
    def vocab_size(self) -> int:
        return self.model.vocabulary.size

    @property
    def length(self) -> int:
        """Greatest number of tokens: what the model's options say, else the example's."""
        text = getattr(self.model.options, "text", self.model.options)
        rows = [part.inputs["input_ids"].shape[1] for part in self.parts.values() if "input_ids" in part.inputs]
        return int(getattr(text, "length", 0)) or max(rows, default=1)
