"""Rows of text with pictures among them, and small models of both forms that read them."""

import pytest
import torch

from tests.models.model_makers import answering

IMAGE = 3
PREFIX, CROSS = {"kind": "prefix"}, {"kind": "cross-attention", "every": 2}
BOTH = pytest.mark.parametrize("fusion", [PREFIX, CROSS], ids=["prefix", "cross"])
# one picture in the middle, none, two, one at the very start
ROWS = [[2, 5, IMAGE, 6, 7], [2, 8, 9], [2, IMAGE, 10, IMAGE, 11, 12], [IMAGE, 13]]
COUNTS = [1, 0, 2, 1]


def open_gates(model):
    with torch.no_grad():
        for block in model.cross.values():
            block.attention_gate.fill_(0.8)
            block.ffn_gate.fill_(-0.6)
    return model


def built(fusion, **changes):
    """A small model of this form whose gates, if it has any, let pictures through."""
    return open_gates(answering(fusion, **changes))
