"""Texts of classes: rows of a batch that belong to the run, not to its samples. Sources: coop, dclip, pcb.

C classes, D texts of a class, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm.config.errors import DataError, RequestError
from vlm.data.streams.options import ClassTexts
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.descriptors import described, descriptors_of, read_descriptors
from vlm.runtime.prompt import LearnedPrompt, class_names
from vlm.types.batch import Role, TokenIds


def class_texts(options: ClassTexts, classes: Sequence[str], prompt: LearnedPrompt | None) -> list[list[str]]:
    """The texts of each class, in order; by the learned prompt where the options have no template of their own.

    Raises DataError for a class without an entry in `descriptors`.
    """
    table = None if options.descriptors is None else read_descriptors(options.descriptors)
    out = []
    for label, name in class_names(classes).items():
        if options.template is not None:
            text = options.template.replace("{}", name, 1)
        else:
            text = name if prompt is None else prompt.text(name, label)
        out.append([text] if table is None else described(text, descriptors_of(table, label, (name,))))
    return out


def class_stream(
    stream: str, options: ClassTexts, classes: Sequence[str], tokenizer: Tokenizer, length: int, prompt: LearnedPrompt | None
) -> TokenIds:
    """[C D, T] rows: `sample_index` the class, `slot` its text, `role` LEARNED where a learned vector goes.

    Raises RequestError for a text that is longer than `length`: cut, it would lose its name.
    """
    texts = class_texts(options, classes, prompt)
    rows = [(owner, slot, text) for owner, own in enumerate(texts) for slot, text in enumerate(own)]
    for (_, _, text), row in zip(rows, tokenizer.ids([text for _, _, text in rows])):
        if len(row) > length:
            shown = text if len(text) <= 60 else f"...{text[-60:]}"
            raise RequestError(
                f"the text of a class takes {len(row)} of {length} tokens: {shown!r}",
                where=f"data.streams.{stream}",
                remedy="shorten tuning.prompt.length, the template or the name",
            )
    if not rows:
        raise DataError("there are no classes", where=f"data.streams.{stream}", remedy="see data.label")
    ids, mask = tokenizer.encode([text for _, _, text in rows], length)
    values = torch.from_numpy(ids)
    known = [] if prompt is None else [tokenizer.token_to_id(token) for token in prompt.tokens]
    learned = torch.isin(values, torch.tensor([i for i in known if i is not None], dtype=torch.int64))
    return TokenIds(
        values,
        torch.from_numpy(mask),
        torch.tensor([owner for owner, _, _ in rows], dtype=torch.int64),
        slot=torch.tensor([slot for _, slot, _ in rows], dtype=torch.int64),
        role=torch.where(learned, int(Role.LEARNED), int(Role.CONTEXT)),
    )
