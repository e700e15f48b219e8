"""From the scene graphs of captions to rows: triples beside a text, and captions made wrong. Source: structure-clip.

n texts, K triples, L tokens of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vlm.data.scene_graph import parse
from vlm.data.scene_swap import swapped
from vlm.data.streams.options import SceneGraphSwap
from vlm.data.tokenizer import Tokenizer
from vlm.types.batch import TokenIds
from vlm.types.random import draw_key


def made_wrong(text: str | None, table: SceneGraphSwap, seed: int, *purpose: str | int) -> str | None:
    """A caption with one exchange, drawn from the seed and what it is for; None where nothing can be exchanged."""
    if text is None:
        return None
    found = swapped(text, table.modes, draw_key(seed, "stream", *purpose))
    return None if found is None else found.text


def with_triples(stream: TokenIds, texts: Sequence[str], tokenizer: Tokenizer, triples: int, tokens: int) -> TokenIds:
    """The rows of n texts with the first `triples` triples of each, every part cut to `tokens` ids without special tokens."""
    ids = np.full((len(texts), triples, 3, tokens), tokenizer.pad_id, np.int64)
    mask = np.zeros((len(texts), triples, 3, tokens), bool)
    places = [(row, k, part, words) for row, text in enumerate(texts) for k, triple in enumerate(parse(text).triples[:triples])
              for part, words in enumerate(triple)]  # fmt: skip
    distinct = {words: number for number, words in enumerate(dict.fromkeys(words for *_, words in places))}
    if places:
        found = [own[:tokens] for own in tokenizer.ids(list(distinct), add_special=False)]
        for row, k, part, words in places:
            own = found[distinct[words]]
            ids[row, k, part, : len(own)] = own
            mask[row, k, part, : len(own)] = True
    return replace(stream, triples=torch.from_numpy(ids), triple_mask=torch.from_numpy(mask))
