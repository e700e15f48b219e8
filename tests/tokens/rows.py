"""Rows and models for the tests of token reduction."""

import torch

from tests.models.model_makers import answering, batch_of, logits_of, pictures_of, rows_of
from vlm.types.batch import Role

IMAGE, INSTRUCTION, ANSWER = 3, int(Role.INSTRUCTION), int(Role.ANSWER)
TOWERS = {"main": dict(width=12, depth=3, heads=2, image_size=32, patch_size=8)}  # 16 visual positions a picture
PROMPTS = [[2, 5, IMAGE, 6, 7], [2, 8, 9, 10], [IMAGE, 2, IMAGE, 11, 12, 13], [2, IMAGE, 14]]
ANSWERS = [[20, 21, 22], [23], [24, 25], [26, 27, 28, 1]]
COUNTS = [1, 0, 2, 1]


def reducing(tokens, **changes):
    return answering(towers=TOWERS, tokens=tokens, **{"length": 96} | changes)


def pictures(seed=0):
    return pictures_of(COUNTS, size=32, seed=seed)


def asked(steps=0, answers=None, **named):
    """The prompts with the first `steps` tokens of their answers."""
    answers = ANSWERS if answers is None else answers
    rows = [p + a[:steps] for p, a in zip(PROMPTS, answers)]
    roles = [[INSTRUCTION] * len(p) + [ANSWER] * min(steps, len(a)) for p, a in zip(PROMPTS, answers)]
    return rows_of(rows, role=roles, **named)


def batch(text=None, seed=0):
    return batch_of(4, text=asked(4) if text is None else text, image=pictures(seed))


def kept(layout):
    return [layout.kept[row, layout.mask[row]].tolist() for row in range(len(layout.mask))]


def equal_bits(first, second, given=None):
    given = batch() if given is None else given
    (one, own), (two, other) = logits_of(first, given), logits_of(second, given)
    return torch.equal(one, two) and torch.equal(own.kept, other.kept)


def check_cached_decoding(model, steps=4):
    """Greedy decoding token by token is what reading everything anew gives; returns positions cached by layer."""
    answers, lengths = [[] for _ in PROMPTS], None
    for side in ("right", "left"):
        logits, cache = model.prefill(rows_of(PROMPTS, side=side), {"image": pictures()})
        lengths = [layer.mask.sum(1).tolist() for layer in cache.layers] if lengths is None else lengths
        for step in range(steps):
            whole, layout = logits_of(model, batch(asked(step, answers)))
            last = torch.stack([whole[row, layout.mask[row]][-1] for row in range(4)])
            assert torch.allclose(logits, last, atol=1e-5), (side, step)
            logits[:, IMAGE] = -torch.inf  # a placeholder is never written
            token = logits.argmax(-1)
            if side == "right":
                for answer, one in zip(answers, token.tolist()):
                    answer.append(one)
            logits, cache = model.advance(token, cache)
    return lengths
