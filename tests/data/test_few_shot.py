"""A few samples of each class: exactly k, the same ones for every reader, more shots around fewer ones. Source: coop."""

import itertools
from collections import Counter

import numpy as np
import pytest

from tests.data.data_makers import Ranks
from vlm.config.errors import DataError
from vlm.data import DataOptions, build_loader
from vlm.data.few_shot import few_shot
from vlm.data.loader import open_split
from vlm.data.mixture import PartOfSource
from vlm.data.sources.uri import open_source
from vlm.data.texts import field_values
from vlm.runtime.pictures import DEFAULT_LIMITS
from vlm.runtime.preprocess import Preprocess

SCENES = "scenes:?n=200&size=16&objects=1"
PRE = Preprocess(16, "squash", "bilinear")


def options(k=3, **table):
    sampler = {"kind": "few-shot", "k": k, **table.pop("sampler", {})}
    return DataOptions.model_validate({"source": SCENES, "val": SCENES, "label": "category", "sampler": sampler, **table})


def keys(source):
    return [source.key(i) for i in range(len(source))]


def classes_of(source):
    return Counter(source.read(i).fields["category"] for i in range(len(source)))


@pytest.mark.parametrize("k", [1, 2, 9])
def test_coop_k_shots_are_k_of_every_class(k):
    whole = open_source(SCENES, DEFAULT_LIMITS)
    counts, there = classes_of(open_split(options(k), "train")), classes_of(whole)
    assert counts == {name: min(k, count) for name, count in there.items()}
    assert min(there.values()) >= 9
    assert len(there) == 8
    assert field_values(open_split(options(k), "train"), options(k), "category") == sorted(there)


def test_a_class_that_has_fewer_gives_all_it_has():
    source = open_split(options(1000), "train")
    assert keys(source) == keys(open_source(SCENES, DEFAULT_LIMITS))


def test_more_shots_hold_the_fewer_ones_and_seeds_draw_others():
    drawn = [set(keys(open_split(options(k), "train", 4))) for k in (1, 2, 4, 8)]
    assert all(one < two for one, two in itertools.pairwise(drawn))
    assert set(keys(open_split(options(8), "train", 5))) != drawn[-1]
    fixed = options(8, sampler={"seed": 4})
    assert set(keys(open_split(fixed, "train", 5))) == drawn[-1]


def test_a_sample_that_is_gone_moves_no_other():
    table = options(4)
    source = open_source(SCENES, DEFAULT_LIMITS)
    before = few_shot(source, table, 0)
    gone = keys(before)[5]
    rest = PartOfSource(source, np.array([i for i in range(len(source)) if source.key(i) != gone]))
    after = few_shot(rest, table, 0)
    assert set(keys(before)) - set(keys(after)) == {gone}
    assert len(after) == len(before)


def test_evaluation_data_are_whole():
    assert len(open_split(options(1), "val")) == 200


def loader(table, *, batch_size=6, communicator=None):
    return build_loader(table, preprocess=PRE, batch_size=batch_size, seed=7, communicator=communicator)


def test_an_epoch_has_every_shot_once_and_a_cursor_goes_on_exactly():
    table = options(3)
    one = loader(table, batch_size=8)
    batches = [next(one) for _ in range(9)]  # 24 samples: three batches an epoch
    for epoch in range(3):
        own = batches[3 * epoch : 3 * epoch + 3]
        assert len({name for batch in own for name in batch.keys}) == 24
        assert Counter(label for batch in own for label in batch["label"].values.tolist()) == dict.fromkeys(range(8), 3)
    first = loader(table, batch_size=8)
    for _ in range(4):
        next(first)
    other = loader(table, batch_size=8)
    other.load_state_dict(first.state_dict())
    assert [next(other).keys for _ in range(5)] == [batch.keys for batch in batches[4:]]


def test_a_cursor_of_other_shots_is_refused():
    first, other = loader(options(3)), loader(options(4))
    with pytest.raises(DataError, match="the data changed"):
        other.load_state_dict(first.state_dict())


def test_ranks_share_the_same_shots():
    alone = loader(options(2), batch_size=4)
    wanted = [list(next(alone).keys) for _ in range(6)]

    def read(communicator):
        own = loader(options(2), batch_size=4, communicator=communicator)
        return [list(next(own).keys) for _ in range(6)]

    shared = Ranks(2).run(read)
    assert [sorted(a + b) for a, b in zip(*shared)] == [sorted(names) for names in wanted]


def test_a_few_of_each_class_want_classes_and_one_source():
    with pytest.raises(ValueError, match="want label"):
        DataOptions.model_validate({"source": SCENES, "sampler": {"kind": "few-shot"}})
    with pytest.raises(ValueError, match="no mixture"):
        DataOptions.model_validate({"label": "name", "mixture": {"a": {"source": SCENES}}, "sampler": {"kind": "few-shot"}})
    with pytest.raises(DataError, match="no sample has the field 'absent'"):
        open_split(options(1, label="absent"), "train")
