"""Placing visual tokens in rows of text: equal to loops over positions on random ragged rows, gradients included."""

import random

import pytest
import torch

from tests.models.model_makers import rows_of
from vlm.models.language import layout_of
from vlm.models.vision_language.expand import Visual, beside, expand, place_pictures
from vlm.types import Pictures

IMAGE, WIDTH = 3, 2


def drawn(seed):
    """(text stream, picture stream, tokens [P, K, C], mask [P, K] or None, rows, pictures of each sample in order)."""
    dice = random.Random(seed)
    samples, size = dice.randint(1, 4), dice.randint(1, 4)
    tiled = dice.random() < 0.5
    kinds = []  # (sample, slot, valid)
    for sample in range(samples):
        for slot in range(dice.choice([0, 0, 1, 2, 3])):
            kinds += [(sample, slot, dice.random() < 0.9) for _ in range(dice.randint(1, 3) if tiled else 1)]
    order = list(range(len(kinds)))
    dice.shuffle(order)
    kinds = [kinds[i] for i in order]
    count = len(kinds)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, size, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.rand(count, size, generator=generator) < 0.7 if dice.random() < 0.5 else None
    stream = Pictures(
        torch.zeros(count, 3, 1, 1),
        torch.tensor([valid for *_, valid in kinds], dtype=torch.bool),
        torch.tensor([sample for sample, *_ in kinds], dtype=torch.int64),
        torch.tensor([slot for _, slot, _ in kinds], dtype=torch.int64),
        place=torch.zeros(count, 3, dtype=torch.int64) if tiled else None,
    )
    groups = []  # by sample: rows of the stream of each picture
    for sample in range(samples):
        rows = [i for i, (owner, _, valid) in enumerate(kinds) if owner == sample and valid]
        slots = sorted({kinds[i][1] for i in rows})
        groups.append([[i for i in rows if kinds[i][1] == slot] for slot in slots])
    lists, owners, stands = [], [], []
    for _ in range(dice.randint(1, 5)):
        sample = dice.randrange(samples)
        by_tile = dice.random() < 0.5
        own = [[i] for group in groups[sample] for i in group] if by_tile else groups[sample]
        row = [dice.randint(4, 20) for _ in range(dice.randint(0, 5))]
        for _ in own:
            row.insert(dice.randint(0, len(row)), IMAGE)
        lists.append(row)
        owners.append(sample)
        stands.append(own)
    text = rows_of(lists, side=dice.choice(["left", "right"]), extra=dice.randint(0, 2))
    text = type(text)(text.values, text.mask, torch.tensor(owners))
    return text, stream, tokens, mask, lists, stands, samples


def by_hand(lists, stands, mask, size):
    """The positions of each row: ("text", place in the row) or ("image", row of the pictures, token)."""
    out = []
    for row, own in zip(lists, stands):
        taken, positions = iter(own), []
        for place, token in enumerate(row):
            if token != IMAGE:
                positions.append(("text", place))
                continue
            for picture in next(taken):
                positions += [("image", picture, k, place) for k in range(size) if mask is None or mask[picture, k]]
        out.append(positions)
    return out


@pytest.mark.parametrize("seed", range(40))
def test_expansion_equals_loops(seed):
    text, stream, tokens, mask, lists, stands, samples = drawn(seed)
    tokens.requires_grad_()
    table = torch.randn(21, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    visual = Visual.of(tokens, mask, stream, samples)
    keys = [str(i) for i in range(samples)]
    places = place_pictures(text, IMAGE, visual, keys=keys, name="text", context="image")
    x, layout = expand(text, table[text.values], places, visual)
    expected = by_hand(lists, stands, mask, tokens.shape[1])
    parts = [
        torch.stack([table[lists[row][at[1]]] if at[0] == "text" else tokens[at[1], at[2]] for at in positions])
        if positions
        else torch.zeros(0, WIDTH, dtype=torch.float64)
        for row, positions in enumerate(expected)
    ]
    assert layout.mask.sum(1).tolist() == [len(positions) for positions in expected]
    cotangent = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for row, (part, positions) in enumerate(zip(parts, expected)):
        assert torch.equal(x[row, : len(part)], part)
        pictures = [at[1] if at[0] == "image" else -1 for at in positions]
        assert layout.picture[row, : len(part)].tolist() == pictures
        assert layout.modality[row, : len(part)].tolist() == [int(at[0] == "image") for at in positions]
        labels = [-100 if at[0] == "image" else lists[row][at[1]] for at in positions]
        assert layout.label[row, : len(part)].tolist() == labels
    got = torch.autograd.grad((x * cotangent)[layout.mask].sum(), (tokens, table), allow_unused=True, retain_graph=True)
    loss = sum(((part * cotangent[row, : len(part)]).sum() for row, part in enumerate(parts)), torch.zeros((), dtype=torch.float64))
    wanted = torch.autograd.grad(loss, (tokens, table), allow_unused=True) if loss.requires_grad else (None, None)
    for one, other in zip(got, wanted):
        zero = torch.zeros((), dtype=torch.float64)
        assert torch.allclose(zero if one is None else one, zero if other is None else other, atol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_tokens_beside_the_rows_equal_loops(seed):
    text, stream, tokens, mask, lists, stands, samples = drawn(seed)
    visual = Visual.of(tokens, mask, stream, samples)
    keys = [str(i) for i in range(samples)]
    places = place_pictures(text, IMAGE, visual, keys=keys, name="text", context="image")
    layout, media = beside(layout_of(text), places, visual)
    expected = [[at for at in positions if at[0] == "image"] for positions in by_hand(lists, stands, mask, tokens.shape[1])]
    if media is None:
        assert not any(expected)
        return
    visible = media.visible(layout)
    for row, positions in enumerate(expected):
        assert media.mask[row].tolist() == [k < len(positions) for k in range(media.mask.shape[1])]
        for k, (_, picture, token, place) in enumerate(positions):
            assert torch.equal(media.tokens[row, k], tokens[picture, token])
            columns = text.mask[row].nonzero()[:, 0]  # the columns of the row's own tokens
            assert visible[row, columns, k].tolist() == [at >= place for at in range(len(lists[row]))]
        assert not visible[row, ~text.mask[row]].any()
        assert not visible[row, :, len(positions) :].any()
    assert not (layout.label == IMAGE).any()
