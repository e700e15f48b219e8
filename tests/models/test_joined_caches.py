"""Rows of two caches in one: each goes on as it would alone, whatever is kept of the rows read so far."""

import pytest
import torch

from tests.models.model_makers import language, random_rows, rows_of

TABLES = {
    "exact": {},
    "lambda": dict(attention={"mask": [{"kind": "lambda", "window": 5, "sinks": 2}], "distance_cap": 5}),
    "lambda rolling": dict(attention={"mask": [{"kind": "lambda", "window": 5, "sinks": 2}], "distance_cap": 5, "cache": "rolling"}),
    "window rolling": dict(attention={"mask": [{"kind": "window", "size": 4}], "cache": "rolling"}),
    "hip": dict(attention=dict(kind="hierarchical", k=4, block_q=4, block_k=1, window=3, sinks=1)),
    "hip that shares choices": dict(
        attention=dict(kind="hierarchical", k=4, block_q=4, block_k=1, window=3, sinks=1, refresh=5)),
    "infllm": dict(attention=dict(kind="block-memory", n_init=2, n_local=6, block=2, topk=1, representatives=1, chunk=3)),
    "linear-decay": dict(mixer={"kind": "linear-decay"}, norm="srms", activation="identity", embed_scale=True),
    "ssm": dict(mixer={"kind": "ssm", "states": 4}),
}
SIZES = [5, 1, 31]
LATER = [[4, 40], [17]]


def advanced(model, cache, steps, rows):
    logits = []
    for step in range(steps):
        given, cache = model.advance(torch.tensor([4 + (step * 5 + row) % 40 for row in rows]), cache)
        logits.append(given)
    return torch.stack(logits), cache


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("before", [0, 1, 40])
@torch.no_grad()
def test_joined_rows_go_on_as_they_would_alone(table, before):
    model, lists = language(**table, length=256), random_rows(SIZES)
    cache = model.prefill(rows_of(lists), {})[1]
    if before:
        cache = advanced(model, cache, before, range(3))[1]
    others = [model.prefill(rows_of(random_rows(sizes, seed=2)), {})[1] for sizes in LATER]
    kept = [t.clone() for c in (cache, *others) for t in c.tensors()]
    whole = cache.joined(others[0]).joined(others[1])
    together = advanced(model, whole, 12, range(6))[0]
    parts = [advanced(model, c, 12, rows)[0] for c, rows in zip((cache, *others), ([0, 1, 2], [3, 4], [5]))]
    assert torch.allclose(together, torch.cat(parts, 1), atol=2e-4)
    assert all(torch.equal(a, b) for a, b in zip(kept, (t for c in (cache, *others) for t in c.tensors())))
    left = whole.rows(torch.tensor([4, 0]))
    assert torch.allclose(advanced(model, left, 12, [4, 0])[0], together[:, [4, 0]], atol=2e-4)
