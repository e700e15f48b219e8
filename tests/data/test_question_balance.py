"""Questions about scenes that nobody trained on: guessing the commonest answer of a kind gains next to nothing."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.data.talk_makers import TOKENIZER, loader_of
from vlm.data import open_source
from vlm.data.sources.readers import open_reader
from vlm.runtime.pictures import DEFAULT_LIMITS

ANSWERS = {"count": 4, "color": 8, "shape": 8, "exists": 2, "relation": 2}


@pytest.fixture(scope="module")
def counts():
    source = open_source("scenes:?n=4000&size=8&split=test")
    reader = open_reader(source.spec(), DEFAULT_LIMITS)
    found: dict[str, Counter[str]] = {kind: Counter() for kind in ANSWERS}
    for index in range(len(source)):
        for question in reader.fields(source.recipe(index))["questions"]:
            found[question["kind"]][question["answer"]] += 1
    return found


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_answers_of_a_kind_are_balanced_in_the_test_set(counts, kind):
    found = counts[kind]
    assert len(found) == ANSWERS[kind]
    assert max(found.values()) / found.total() < 1 / ANSWERS[kind] + 0.03
    assert min(found.values()) / found.total() > 1 / ANSWERS[kind] - 0.03


def test_kinds_are_drawn_alike_where_a_scene_has_them():
    streams = {"text": {"kind": "conversation", "questions": "questions"}}
    with loader_of("scenes:?n=1200&size=8", streams, batch_size=1200) as loader:
        batch = next(loader)
    source = open_source("scenes:?n=1200&size=8")
    reader = open_reader(source.spec(), DEFAULT_LIMITS)
    expected: Counter[str] = Counter()
    found: Counter[str] = Counter()
    questions = {source.key(i): reader.fields(i)["questions"] for i in range(1200)}
    text = batch["text"]
    for row, key in enumerate(batch.keys):
        said = TOKENIZER.decode(text.values[row][text.mask[row] & (text.role[row] == 1)].tolist())
        kinds = [q["kind"] for q in questions[key]]
        for kind in kinds:
            expected[kind] += 1 / len(kinds)
        found[next(q["kind"] for q in questions[key] if q["question"] == said)] += 1
    for kind, count in expected.items():
        assert abs(found[kind] - count) < 4 * count**0.5
