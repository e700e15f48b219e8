"""The bundle of a language model: it scores texts and continues them.

n rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from vlm.config.errors import GateFailed
from vlm.runtime.generator import BundleGenerator
from vlm.runtime.manifest import Manifest, golden_of
from vlm.runtime.session import CPU, open_graph


class LanguageBundle(BundleGenerator):
    """A decoder's bundle: a `Generator`, and what perplexity needs of a language model.

    length: greatest number of positions; packs: several documents may share a row; starts: a document begins with a
    token that is given, not predicted. A bundle without the graph that has a cache scores, but writes nothing.
    """

    kind = "language"
    decoder = "decoder_with_past"
    packs = False

    def __init__(
        self, directory: Path, manifest: Manifest, *, threads: int | None, batch_size: int = 32, providers: Sequence[str] = (CPU,)
    ) -> None:
        super().__init__(directory, manifest, threads=threads, batch_size=batch_size, providers=providers)
        self.starts: bool = manifest.require("text", "starts", bool, self.where)
        self._session = open_graph(directory, manifest, "decoder", threads, providers)

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """Right-padded ids int64 [n, T] to float32 [n, T, V]."""
        return cast(np.ndarray, self._session.run(["logits"], {"input_ids": np.asarray(input_ids, np.int64)})[0])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, not cut."""
        return self.tokenizer.whole_rows(texts)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as text."""
        return self.tokenizer.pieces(ids)

    def nats(self, ids: Any, segment: Any, scored: np.ndarray | None = None) -> Any:
        """-log p of the token after each scored position, float64 [scored.sum()] in row order.

        ids, segment, scored [n, T]; segment -1 is padding. One document a row: raises ValueError for packed rows. Called
        with two arguments, they are prompts and answers, as `BundleGenerator.nats` takes them.
        """
        if scored is None:
            return super().nats(ids, segment)
        if segment.size and segment.max() > 0:
            raise ValueError("this graph takes one document a row")
        out = []
        for row, wanted in zip(ids, scored):
            at = np.flatnonzero(wanted)
            if len(at):
                logits = self.logits(row[None])[0, at].astype(np.float64)
                top = logits.max(axis=1)
                total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
                out.append(total - logits[np.arange(len(at)), row[at + 1]])
        return np.concatenate(out) if out else np.zeros(0)

    def self_test(self) -> float:
        """Compare the last logits of the golden texts with what the training framework gave.

        Returns the greatest difference over the largest logit. Raises GateFailed above the bundle's tolerance.
        """
        limit = self.manifest.tolerance("max_abs", 1e-3, self.where)
        worst = 0.0
        with golden_of(self.directory) as golden:
            for text, ids, wanted in zip(golden["texts"], golden["ids"], golden["last_logits"], strict=True):
                if self.tokenizer.rows([text])[0] != ids:
                    raise GateFailed(f"the golden text {text!r} gives other ids", where=str(self.directory))
                expected = np.asarray(wanted, np.float32)
                got = self.logits(np.asarray([ids]))[0, -1]
                worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
        if not worst <= limit:
            raise GateFailed(f"the golden logits are reproduced to {worst:.2e}, expected {limit:.0e}", where=str(self.directory))
        if self.writes:
            super().self_test()
        return worst
