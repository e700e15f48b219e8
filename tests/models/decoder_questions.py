"""What every decoder loop is asked, whatever its trunk keeps of the positions read: plain attention, masks, chosen keys, states.

A row alone, without padding and without a cache, is the oracle. `atol` is what the trunk's sums may differ by.
"""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from tests.models.model_makers import random_rows, rows_of
from vlm.models.decoder import run_decoder
from vlm.models.language import layout_of


def states(model, stream, **named):
    return run_decoder(model.trunk, model.tokens(stream.values), layout_of(stream), **named)


def by_row(stream, x):
    """The valid positions of every row of x [n, S, C]."""
    return [x[row, stream.mask[row]] for row in range(len(stream))]


def padded_equals_alone(model, lists, side, *, atol=1e-5, **named):
    """Rows with padding on one side are what each is alone. Returns the padded stream and the result of reading it."""
    stream = rows_of(lists, side=side, extra=3)
    result = states(model, stream, **named)
    for values, got in zip(lists, by_row(stream, result.x), strict=True):
        assert torch.allclose(got, states(model, rows_of([values])).x[0], atol=atol)
    return stream, result


def order_changes_nothing(model, lists, side, padded):
    """padded: the rows as read in their order."""
    turned = rows_of(lists[::-1], side=side)
    for one, other in zip(padded, by_row(turned, states(model, turned).x)[::-1], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def packed_rows(lists, **named):
    """One row of several documents, with padding behind them; `named` are further per-token lists of each document."""
    named["segment"] = [[number] * len(values) for number, values in enumerate(lists)]
    further = {name: [list(chain(*values))] for name, values in named.items()}
    stream = rows_of([list(chain(*lists))], extra=2, **further)
    return replace(stream, segment=torch.where(stream.mask, stream.segment, -1))


def packed_equals_rows_and_is_not_continued(model, lists, **named):
    stream = packed_rows(lists, **named)
    together = states(model, stream).x[0]
    start = 0
    for values in lists:
        assert torch.allclose(together[start : start + len(values)], states(model, rows_of([values])).x[0], atol=1e-5)
        start += len(values)
    with pytest.raises(ValueError, match="packs several documents"):
        states(model, stream, keep_cache=True)
    cache = states(model, rows_of([lists[0]]), keep_cache=True).cache
    with pytest.raises(ValueError, match="packed documents cannot be appended"):
        states(model, stream, cache=cache)


def cached_equals_uncached(model, lists, side, step, *, atol=1e-5):
    """6 tokens a row are appended, `step` at a time. Returns the cache before them and after."""
    more = random_rows([6] * len(lists), seed=5)
    first = cache = states(model, rows_of(lists, side=side, extra=1), keep_cache=True).cache
    for start in range(0, 6, step):
        result = states(model, rows_of([row[start : start + step] for row in more]), cache=cache)
        cache = result.cache
        for row, values in enumerate(lists):
            whole = states(model, rows_of([values + more[row][: start + step]])).x[0, -step:]
            assert torch.allclose(result.x[row], whole, atol=atol)
        assert result.layout.position[:, -1].tolist() == [len(values) + start + step - 1 for values in lists]
    assert cache.next_position.tolist() == [[len(values) + 6] * 4 for values in lists]
    return first, cache


def ragged_pieces_equal_whole_rows(model, lists, pieces, side, *, atol=1e-5):
    """Pieces of unequal length are appended with their own padding. Returns the cache after them and what it has read."""
    cache = states(model, rows_of(lists), keep_cache=True).cache
    read = [list(values) for values in lists]
    for piece in pieces:
        stream = rows_of(piece, side=side)
        result = states(model, stream, cache=cache)
        cache = result.cache
        for row, got in enumerate(by_row(stream, result.x)):
            read[row] += piece[row]
            whole = states(model, rows_of([read[row]])).x[0, len(read[row]) - len(piece[row]) :]
            assert torch.allclose(got, whole, atol=atol)
    assert cache.next_position[:, 0].tolist() == [len(values) for values in read]
    return cache, read


def rows_of_a_cache_go_on(model, cache, read, *, atol=1e-5):
    """Rows kept, repeated and reordered continue what each had read."""
    index = torch.tensor([3, 0, 0])
    grown = states(model, rows_of([[9], [10], [11]]), cache=cache.rows(index)).x
    for row, (source, token) in enumerate(zip(index.tolist(), (9, 10, 11))):
        alone = states(model, rows_of([read[source] + [token]])).x[0, -1]
        assert torch.allclose(grown[row, 0], alone, atol=atol)


def an_empty_row_is_harmless(model):
    """Beside a row of three tokens. Returns both with the token 8 appended, [2, 1, C]."""
    result = states(model, rows_of([[], [5, 6, 7]]), keep_cache=True)
    assert torch.isfinite(result.x).all()
    assert result.cache.next_position[:, 0].tolist() == [0, 3]
    after = states(model, rows_of([[8], [8]]), cache=result.cache).x
    assert torch.allclose(after[0, 0], states(model, rows_of([[8]])).x[0, 0], atol=1e-5)
    return after
