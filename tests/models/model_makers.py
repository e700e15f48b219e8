"""Small models and rows for the tests of the decoder."""

import torch

from vlm.models import LanguageModel, LanguageOptions, VisionLanguageOptions
from vlm.types import Batch, Pictures, TokenIds, VocabularyLayout

VOCABULARY = VocabularyLayout.of_text(61, {"pad": 0, "eos": 1, "bos": 2, "image": 3})


def shaken(model, amount=0.1, seed=1):
    """The model with noise on every parameter, in evaluation mode: no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return model.eval()


def language(**changes):
    torch.manual_seed(0)
    table = dict(width=16, depth=4, heads=4, kv_heads=2, ffn_width=24, length=64) | changes
    options = LanguageOptions(**table)
    return shaken(LanguageModel(options.filled(VOCABULARY), VOCABULARY))


def rows_of(lists, *, side="right", extra=0, **named):
    """Token rows of ragged lists, padded to the longest plus `extra`; `named` are further per-token lists."""
    length = max(map(len, lists), default=0) + extra
    ids = torch.zeros(len(lists), length, dtype=torch.int64)
    mask = torch.zeros(len(lists), length, dtype=torch.bool)
    further = {name: torch.zeros(len(lists), length, dtype=torch.int64) for name in named}
    for row, values in enumerate(lists):
        place = slice(0, len(values)) if side == "right" else slice(length - len(values), length)
        ids[row, place] = torch.tensor(values, dtype=torch.int64)
        mask[row, place] = True
        for name, given in named.items():
            further[name][row, place] = torch.tensor(given[row], dtype=torch.int64)
    if "supervised" in further:
        further["supervised"] = further["supervised"].bool()
    return TokenIds(ids, mask, torch.arange(len(lists)), **further)


def random_rows(sizes, seed=0, low=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, 61, (size,), generator=generator).tolist() for size in sizes]




TOWER = dict(width=12, depth=2, heads=2, image_size=16, patch_size=8)  # 4 patches


def answering(fusion=None, *, towers=None, tokens=None, shake=0.1, **changes):
    """A small model that reads pictures and answers."""
    torch.manual_seed(0)
    table = dict(
        towers=towers or {"main": TOWER},
        connector={"kind": "linear", "dropout": 0.0},
        language=dict(width=16, depth=4, heads=4, kv_heads=2, ffn_width=24, length=64),
        fusion=fusion or {"kind": "prefix"},
        length=64,
        tokens=tokens,
    )
    model = VisionLanguageOptions.model_validate(table | changes).build(VOCABULARY)
    return shaken(model, shake)


def pictures_of(counts, *, seed=0, size=16):
    """A stream with `counts[b]` pictures of sample b."""
    index = [sample for sample, count in enumerate(counts) for _ in range(count)]
    slot = [number for count in counts for number in range(count)]
    values = torch.rand(len(index), 3, size, size, generator=torch.Generator().manual_seed(seed))
    return Pictures(values, torch.ones(len(index), dtype=torch.bool), torch.tensor(index, dtype=torch.int64),
                    torch.tensor(slot, dtype=torch.int64))


def batch_of(samples, **streams):
    """A batch whose keys are `sample 0`, ...; `image__noisy` is the stream `image.noisy`."""
    index = torch.arange(samples)
    named = {name.replace("__", "."): stream for name, stream in streams.items()}
    return Batch(named, [f"sample {i}" for i in range(samples)], index, index * 0)


def logits_of(model, batch, key="text"):
    output = model.encode(batch, {key: frozenset({"vocabulary"})})[key]
    return output.vocabulary.logits(), output.layout
