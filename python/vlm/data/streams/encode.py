"""Pieces of a conversation to a row of ids that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vlm.config.errors import DataError
from vlm.data.samples import BadSample
from vlm.data.streams.numbers import PLAIN, Marked
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.pieces import IMAGE, TAG, Piece, PieceIds, encode_pieces
from vlm.runtime.tiled import row_positions
from vlm.types.batch import Features, TokenIds


@dataclass(frozen=True)
class EncodedRow:
    """ids, role and supervised by token; pictures: placeholders among them; positions: after they are expanded.

    weights: stream of token weights -> one by token.
    """

    ids: list[int]
    role: list[int]
    supervised: list[bool]
    pictures: int
    positions: int
    weights: dict[str, list[float]] = field(default_factory=dict)


class ConversationEncoder:
    """length: positions of a row, of which a row of pictures takes `picture_positions` (1 where the model does not say).

    tiles_apart: tiles and their tags take none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int,
        picture_positions: int | None,
        pictures: bool,
        *,
        tiles_apart: bool = False,
    ) -> None:
        """Raises DataError when there are pictures and the tokenizer has no placeholder for them."""
        self.tokenizer, self.length, self.tiles_apart = tokenizer, length, tiles_apart
        self.cost = 1 if picture_positions is None else picture_positions
        self.image_id = tokenizer.token_to_id(IMAGE)
        if pictures and self.image_id is None:
            raise DataError(
                f"the tokenizer has no token {IMAGE}, which stands for a picture",
                remedy=f'add it: tokenizer.special = ["{IMAGE}"]',
            )
        self._ids_of = PieceIds(tokenizer._core, () if self.image_id is None else (self.image_id,))

    def encode(
        self,
        pieces: Sequence[Piece],
        places: Sequence[tuple[int, int, int]] = (),
        marks: Mapping[str, Sequence[Marked]] | None = None,
    ) -> EncodedRow:
        """The row, its answer cut from the right where it is too long (then without what ends it).

        places: of the tile of each placeholder, where pictures were cut. marks: stream -> weights of each answer. Raises BadSample
        when a picture or the whole answer would have to go.
        """
        ids, role, supervised = encode_pieces(
            pieces, self._ids_of, self.image_id, self.tokenizer.bos_id, self.tokenizer.eos_id
        )
        pictures = sum(piece.kind == "picture" for piece in pieces)
        tags = {at for at, own in enumerate(role) if own == TAG}
        positions = row_positions(ids, self.image_id, self.cost, places, tags, apart=self.tiles_apart)
        excess = positions - self.length
        if excess > 0:
            kept = max(0, len(ids) - excess)
            if not any(supervised[:kept]) or (pictures and self.image_id in ids[kept:]):
                first = positions - (len(ids) - supervised.index(True)) if any(supervised) else positions
                raise BadSample("too_long", f"the prompt takes {first} of {self.length} positions, {pictures} pictures included")
            ids, role, supervised = ids[:kept], role[:kept], supervised[:kept]
            positions = self.length
        weights = {name: self._weights(pieces, own)[: len(ids)] for name, own in (marks or {}).items()}
        return EncodedRow(ids, role, supervised, pictures, positions, weights)

    def _weights(self, pieces: Sequence[Piece], marks: Sequence[Marked]) -> list[float]:
        """The weight of each token of the whole row; 0 where none is supervised."""
        out: list[float] = []
        left = iter(marks)
        mark = PLAIN
        for piece in pieces:
            if piece.kind == "text" and piece.supervised:
                mark = next(left)
                out += [mark.at(start, stop) for _, start, stop in self._ids_of.located(piece.text)]
            else:
                ids, _, _ = encode_pieces([piece], self._ids_of, self.image_id, self.tokenizer.bos_id, self.tokenizer.eos_id)
                out += [mark.end if piece.supervised else 0.0] * len(ids)
        return out


def conversation_stream(rows: Sequence[tuple[int, EncodedRow]], pad_id: int) -> TokenIds:
    """(sample, row) as ids [n, T] with mask, role and supervised, padded right to the longest row."""
    n, width = len(rows), max((len(row.ids) for _, row in rows), default=1)
    ids = np.full((n, width), pad_id, np.int64)
    mask = np.zeros((n, width), bool)
    role = np.zeros((n, width), np.int64)
    supervised = np.zeros((n, width), bool)
    for i, (_, row) in enumerate(rows):
        k = len(row.ids)
        ids[i, :k], role[i, :k], supervised[i, :k] = row.ids, row.role, row.supervised
        mask[i, :k] = True
    return TokenIds(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.tensor([sample for sample, _ in rows], dtype=torch.int64),
        supervised=torch.from_numpy(supervised),
        role=torch.from_numpy(role),
    )


def weight_stream(name: str, rows: Sequence[tuple[int, EncodedRow]], of: TokenIds) -> Features:
    """The token weights `name` of each (sample, row), beside the ids `of` them: [n, T]. A row without any has 1 where supervised."""
    values = np.zeros(tuple(of.values.shape), np.float32)
    for i, (_, row) in enumerate(rows):
        values[i, : len(row.ids)] = row.weights.get(name, row.supervised)
    return Features(torch.from_numpy(values), of.mask, of.sample_index)


def encoded_or_reason(
    encoder: ConversationEncoder,
    conversations: Mapping[str, Sequence[Piece]],
    places: Sequence[tuple[int, int, int]] = (),
    marks: Mapping[str, Mapping[str, Sequence[Marked]]] | None = None,
) -> tuple[dict[str, EncodedRow], str, str]:
    """(rows by stream, reason, detail): reason is empty where all conversations of a sample fit.

    marks: conversation -> stream of token weights -> those of each of its answers.
    """
    rows: dict[str, EncodedRow] = {}
    for name, pieces in conversations.items():
        try:
            rows[name] = encoder.encode(pieces, places, (marks or {}).get(name))
        except BadSample as error:
            return {}, error.reason, f"{name}: {error.detail}"
    return rows, "", ""
