"""Growing caches: the same numbers as joined tensors, and no cache changes under another's feet."""

import pytest
import torch

from tests.models.model_makers import language, random_rows, rows_of
from vlm.attention.room import LEAST_ROOM, Room
from vlm.models.cache import LayerCache
from vlm.models.decoder import run_decoder
from vlm.models.language import layout_of

SIZES = [5, 1, 11, 7]


def advanced(model, cache, tokens):
    """Logits after each token of the row `tokens`, the same for all rows, and the last cache."""
    logits = []
    for token in tokens:
        given, cache = model.advance(torch.full((len(cache.next_position),), token), cache)
        logits.append(given)
    return torch.stack(logits), cache


def prompts(model, lists=None):
    return model.prefill(rows_of(lists or random_rows(SIZES)), {})[1]


@pytest.mark.parametrize("steps", [1, LEAST_ROOM - 1, LEAST_ROOM, 3 * LEAST_ROOM + 7])
def test_storage_that_grows_gives_the_bits_of_joined_tensors(steps):
    model, tokens = language(length=256), [4 + step % 50 for step in range(steps)]
    with torch.no_grad():
        grown, cache = advanced(model, prompts(model), tokens)
        assert all(layer.room is not None for layer in cache.layers)
    joined, other = advanced(model, prompts(model), tokens)  # with gradients nothing is written in place
    assert all(layer.room is None for layer in other.layers)
    assert torch.equal(grown, joined.detach())
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)
    assert cache.bytes == other.bytes == 2 * 4 * 4 * 2 * 4 * (max(SIZES) + steps) * 4


@torch.no_grad()
def test_caches_that_part_ways_do_not_meet_again():
    model = language()
    start = advanced(model, prompts(model), [9])[1]
    left, left_cache = advanced(model, start, [10, 11])
    right, right_cache = advanced(model, start, [12, 13])
    again, _ = advanced(model, start, [10, 11])
    assert torch.equal(left, again)
    fresh = advanced(model, prompts(model), [9, 12, 13])[0][1:]
    assert torch.equal(right, fresh)
    # Both go on after the other has grown.
    assert torch.equal(advanced(model, left_cache, [14])[0][0], advanced(model, prompts(model), [9, 10, 11, 14])[0][-1])
    assert torch.equal(advanced(model, right_cache, [14])[0][0], advanced(model, prompts(model), [9, 12, 13, 14])[0][-1])


@torch.no_grad()
def test_reordered_rows_take_their_free_places_along():
    model, index = language(), torch.tensor([2, 2, 0])
    cache = advanced(model, prompts(model), [9, 10])[1]
    chosen = cache.rows(index)
    room = chosen.layers[0].room
    after, grown = advanced(model, chosen, [11, 12])
    assert grown.layers[0].room is room
    alone = advanced(model, prompts(model, [random_rows(SIZES)[row] for row in index]), [9, 10, 11, 12])[0][2:]
    assert torch.allclose(after, alone, atol=1e-5)
    older = advanced(model, cache, [11])[1]  # a cache that has grown since: the rows of its earlier self
    assert cache.rows(index).layers[0].room is None
    assert older.layers[0].room is cache.layers[0].room
    assert torch.equal(advanced(model, cache.rows(index), [11, 12])[0], after)
    assert {id(layer.mask) for layer in chosen.layers} == {id(chosen.layers[0].mask)}


def test_a_cache_of_inference_mode_goes_on_outside_and_back():
    model = language()
    with torch.inference_mode():
        cache = advanced(model, prompts(model), [9])[1]
    with torch.no_grad():
        outside, cache = advanced(model, cache, [10])
    with torch.inference_mode():
        inside, _ = advanced(model, cache, [11])
    with torch.no_grad():
        expected = advanced(model, prompts(model), [9, 10, 11])[0]
    assert torch.equal(torch.cat([outside, inside]), expected[1:])


def test_gradients_flow_through_an_appended_piece():
    model, lists = language(), random_rows([6, 4])
    head, tail = [row[:3] for row in lists], [row[3:] for row in lists]
    cache = run_decoder(model.trunk, model.tokens(rows_of(head).values), layout_of(rows_of(head)), keep_cache=True).cache
    rest = rows_of(tail)
    run_decoder(model.trunk, model.tokens(rest.values), layout_of(rest), cache=cache).x[rest.mask].square().sum().backward()
    gradient = model.trunk.blocks[0].attention.k.weight.grad.clone()
    model.zero_grad()
    whole = rows_of(lists)
    x = run_decoder(model.trunk, model.tokens(whole.values), layout_of(whole)).x
    sum(x[row, 3 : len(values)].square().sum() for row, values in enumerate(lists)).backward()
    assert torch.allclose(gradient, model.trunk.blocks[0].attention.k.weight.grad, atol=1e-4)


def test_a_room_takes_any_shape_and_another_type_is_joined():
    with torch.no_grad():
        empty = LayerCache(torch.zeros(2, 1, 0, 3), torch.zeros(2, 1, 0, 3), torch.ones(2, 0, dtype=torch.bool))
        piece = torch.randn(2, 1, 5, 3)
        grown = empty.grown(piece, piece + 1, torch.ones(2, 5, dtype=torch.bool))
        assert torch.equal(grown.keys, piece)
        assert torch.equal(grown.values, piece + 1)
        half = grown.grown(piece.bfloat16(), piece.bfloat16(), torch.ones(2, 10, dtype=torch.bool))
        assert half.keys.dtype == torch.float32
        assert half.room is None
        assert Room.of(piece, piece, 7).keys.shape == (2, 1, 5 + 7 + LEAST_ROOM, 3)
