"""Tokenizer: byte-level BPE trained here, or a local Hugging Face directory, over the `tokenizers` library.

Only `tokenizer.json` and `tokenizer_config.json` are read: no pickle, no code from the directory, no slow
tokenizers. Shapes: n texts, T positions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from vlm.config.errors import DataError
from vlm.runtime.tokens import cut, pad, tokenizer_config, tokenizers_from

DEFAULT_SPECIAL = {"pad": "<pad>", "eos": "</s>", "bos": "<s>"}
# In the order of their ids. eos must not be 2: `transformers` (and `models/towers.py`) read a CLIP config with
# eos_token_id 2 as one of the early published ones, whose text tower pools at the greatest id instead.


_ENDS = "end_token_ids"
"""In tokenizer_config.json: what a published model says in generation_config.json, so that it outlives training and export."""


def _published_ends(folder: Path) -> list[int]:
    """The tokens at which a published model ends an answer: eos_token_id of generation_config.json, else of config.json. Raises
    DataError naming the file."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            given = json.loads(path.read_bytes()[: 4 * 2**20])
        except ValueError as error:
            raise DataError(f"cannot be read as JSON: {error}", where=str(path)) from error
        ends = given.get("eos_token_id") if isinstance(given, dict) else None
        if ends is None:
            continue
        ends = ends if isinstance(ends, list) else [ends]
        if not all(type(i) is int and i >= 0 for i in ends):
            raise DataError(f"eos_token_id is {ends!r}, expected an id or a list of ids", where=str(path))
        return ends
    return []


class Tokenizer:
    """Texts to ids and back. `pad_id`, `bos_id`, `eos_id`: int, the last two None where there is no such token. `end_ids`: all
    tokens at which a model that came with it ends an answer, eos among them."""

    def __init__(self, core: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self._core = core
        self._config = config
        core.no_truncation()
        core.no_padding()
        self.bos_id = self._special("bos_token")
        self.eos_id = self._special("eos_token")
        pad = self._special("pad_token")
        fallback = self.eos_id if self.eos_id is not None else 0
        self.pad_id: int = pad if pad is not None else fallback
        self.padding_side: str = config.get("padding_side") or "right"
        if self.padding_side not in ("left", "right"):
            raise DataError(f"padding_side is {self.padding_side!r}, expected left or right")
        ends = config.get(_ENDS, [])
        if not isinstance(ends, list) or not all(type(i) is int and i >= 0 for i in ends):
            raise DataError(f"{_ENDS} is {ends!r}, expected a list of ids")
        self.end_ids = frozenset(ends) | ({self.eos_id} if self.eos_id is not None else set())

    @classmethod
    def train_bpe(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special: Sequence[str] = (),
        *,
        max_length: int | None = None,
    ) -> Tokenizer:
        """Byte-level BPE of at most `vocab_size` entries, with pad 0, eos 1, bos 2 and then the names in `special`.

        Every text can be encoded: the 256 bytes are always in the vocabulary. Equal texts give equal tokenizers.
        Raises DataError when vocab_size cannot hold the bytes and the special tokens.
        """
        names = [*DEFAULT_SPECIAL.values(), *special]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + len(names):
            raise DataError(
                f"vocab_size is {vocab_size}, expected at least {len(alphabet) + len(names)}",
                remedy="256 entries are the bytes, the rest special tokens and merges",
            )
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=names,
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        bos, eos = DEFAULT_SPECIAL["bos"], DEFAULT_SPECIAL["eos"]
        core.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A {eos}",
                    pair=f"{bos} $A {eos} $B:1 {eos}:1",
                    special_tokens=[(bos, core.token_to_id(bos)), (eos, core.token_to_id(eos))],
                ),
            ]
        )
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": DEFAULT_SPECIAL["pad"],
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length or 1_000_000,
        }
        if special:
            config["additional_special_tokens"] = list(special)
        return cls(core, config)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a local directory. Raises DataError when a file is missing, too large or not of the form."""
        folder = Path(directory)
        path = folder / "tokenizer.json"
        if not path.is_file():
            found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
            raise DataError(
                f"no tokenizer.json (found: {', '.join(found) or 'nothing'})",
                where=str(folder),
                remedy="slow tokenizers are not read; convert once with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        core, config = tokenizers_from(path), tokenizer_config(folder)
        try:
            tokenizer = cls(core, config)
        except DataError as error:
            raise DataError(error.message, where=str(folder / "tokenizer_config.json")) from error
        ends = [] if _ENDS in config else _published_ends(folder)
        return tokenizer if tokenizer.end_ids.issuperset(ends) else cls(core, config | {_ENDS: ends})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json; transformers' AutoTokenizer encodes the same ids."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self._config.items() if key != "auto_map"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        (folder / "tokenizer.json").write_text(self._core.to_str(pretty=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special and added tokens included: the rows an embedding needs."""
        return max(self._core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def max_length(self) -> int | None:
        """The longest text that the configuration allows, in tokens, or None where it does not say."""
        value = self._config.get("model_max_length")
        return int(value) if isinstance(value, int | float) and 0 < value < 1_000_000 else None

    def with_special(self, tokens: Sequence[str], *, strip: bool = False) -> Tokenizer:
        """A tokenizer that has these special tokens too: the missing ones get the next ids, all others keep theirs.

        strip: white space before such a token belongs to it.
        """
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False, lstrip=strip) for token in tokens])
        named = [_content(token) for token in self._config.get("additional_special_tokens") or ()]
        config = {**self._config}
        if more := [*named, *(token for token in dict.fromkeys(tokens) if token not in named)]:
            config["additional_special_tokens"] = more
        return Tokenizer(core, config)

    def agrees(self, other: Tokenizer) -> bool:
        """Whether a text has the same ids under both; special tokens that only one of them has do not count."""
        if self.eos_id != other.eos_id:
            return False
        one, two = (json.loads(tokenizer._core.to_str()) for tokenizer in (self, other))
        if any(one.get(part) != two.get(part) for part in ("model", "normalizer", "pre_tokenizer")):
            return False
        added = {token["content"]: token["id"] for token in two["added_tokens"]}
        return all(added.get(token["content"], token["id"]) == token["id"] for token in one["added_tokens"])

    def token_to_id(self, token: str) -> int | None:
        return self._core.token_to_id(token)

    def ids(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """The ids of each text, neither cut nor padded."""
        return [e.ids for e in self._core.encode_batch(list(texts), add_special_tokens=add_special)]

    def located(self, texts: Sequence[str]) -> list[list[tuple[int, int, int]]]:
        """The same as (id, from, to): the characters that each id stands for; 0, 0 of a special token that the text does not spell."""
        return [
            [(i, start, stop) for i, (start, stop) in zip(e.ids, e.offsets)]
            for e in self._core.encode_batch(list(texts), add_special_tokens=True)
        ]

    def encode(
        self, texts: Sequence[str], length: int, *, add_special: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n, length] int64, mask [n, length] bool). A long text loses its end but keeps the closing eos.

        Padding goes to the side that the configuration names; the mask, not the pad id, says what is valid.
        """
        if length < 1:
            raise ValueError(f"length is {length}, expected at least 1")
        encodings = self._core.encode_batch(list(texts), add_special_tokens=add_special)
        rows = [cut(e.ids, e.special_tokens_mask if add_special else (), length) for e in encodings]
        return pad(rows, length, self.pad_id, self.padding_side)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of one row of ids; ids outside the vocabulary are left out."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _special(self, name: str) -> int | None:
        value = self._config.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str):
            return None
        found = self._core.token_to_id(token)
        if found is None:
            raise DataError(f"{name} {token!r} is not in the vocabulary")
        return found


def _content(token: Any) -> str:
    """A special token as a configuration writes it: the text, or a table with the text as `content`."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)
