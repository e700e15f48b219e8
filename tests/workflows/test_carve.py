"""Parts of a source by concept: disjoint, complete, the same samples."""

import json

import numpy as np
import pytest

from vlm.config.errors import DataError
from vlm.data.loader import build_loader, open_split
from vlm.data.mixture import order_of
from vlm.data.options import DataOptions
from vlm.data.sources.uri import open_source
from vlm.workflows.carve import CarvedData, Carving, evaluation_data, held_out, is_held_out

BY = ("concept", "caption")


@pytest.fixture
def train(pictures):
    return open_source(str(pictures / "train.jsonl"))


def parts(source, share=0.2):
    return Carving(BY, share, True).of(source), Carving(BY, share, False).of(source)


def concepts(source):
    return {source.read(i).fields["concept"] for i in range(len(source))}


def test_the_parts_are_disjoint_and_complete(train):
    dev, rest = parts(train)
    assert 0 < len(dev) < len(rest)
    assert sorted([*dev.places, *rest.places]) == list(range(len(train)))


def test_no_concept_is_on_both_sides(train):
    dev, rest = parts(train)
    assert not concepts(dev) & concepts(rest)
    assert concepts(dev) | concepts(rest) == concepts(train)


def test_a_sample_keeps_its_id_key_and_content(train):
    dev, _ = parts(train)
    for index, place in enumerate(dev.places):
        assert dev.ids[index] == train.ids[place]
        assert dev.key(index) == train.key(place)
        assert dev.recipe(index) == train.recipe(place)
    assert dev.read(0).fields["caption"] == train.read(dev.places[0]).fields["caption"]
    assert dev.spec() == train.spec()


def test_a_value_alone_decides(train):
    """The part does not depend on the other samples, on case or on spacing."""
    mask = held_out(train, BY, 0.2)
    for index in range(0, len(train), 7):
        concept = train.read(index).fields["concept"]
        assert mask[index] == is_held_out(concept, 0.2) == is_held_out(f"  {concept.upper()} ", 0.2)


def test_the_share_is_about_what_was_asked_for_and_grows_by_adding():
    values = [f"concept {i}" for i in range(4000)]
    small, large = ({v for v in values if is_held_out(v, share)} for share in (0.1, 0.3))
    assert small < large
    assert len(small) / 4000 == pytest.approx(0.1, abs=0.02)
    assert len(large) / 4000 == pytest.approx(0.3, abs=0.03)


def test_the_first_field_that_a_sample_has_decides(tmp_path):
    rows = [{"caption": f"thing {i % 10}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "a.jsonl"))
    mask = held_out(source, ("concept", "caption"), 0.5)
    assert mask.tolist() == [is_held_out(row["caption"], 0.5) for row in rows]
    by_key = held_out(source, ("absent",), 0.5)
    assert by_key.tolist() == [is_held_out(source.key(i), 0.5) for i in range(40)]


def test_an_empty_part_is_an_error_that_names_the_setting(train):
    with pytest.raises(DataError, match=r"claim\.tune\.by"):
        Carving(BY, 1e-9, True).of(train)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_reads_a_part_and_nothing_else(train, workers):
    _, rest = parts(train)
    options = DataOptions(workers=workers)
    own = {rest.key(i) for i in range(len(rest))}
    with build_loader(options, batch_size=len(rest), source=rest, tokenizer=_tokenizer()) as loader:
        keys = next(loader).keys
    assert set(keys) == own
    assert len(keys) == len(rest)


def test_evaluation_reads_a_part_and_nothing_else(pictures, train):
    dev, _ = parts(train)
    data = evaluation_data(str(pictures / "train.jsonl"), DataOptions(), Carving(BY, 0.2, True))
    assert isinstance(data, CarvedData)
    items = list(data.items())
    assert [item.key for item in items] == [dev.key(i) for i in range(len(dev))]
    assert np.asarray(items[0].picture()).shape == (16, 16, 3)
    assert {item.fields["concept"] for item in items} == concepts(dev)


def _tokenizer():
    from vlm.data.tokenizer import Tokenizer

    return Tokenizer.train_bpe(["red green", "blue white"], 300)


def test_a_mixture_is_cut_source_by_source_and_keeps_its_shares(pictures):
    uri = str(pictures / "train.jsonl")
    options = DataOptions(mixture={"a": {"source": uri, "weight": 3.0}, "b": {"source": uri}})
    whole = open_split(options, "train")
    dev, rest = parts(whole)
    assert not concepts(dev) & concepts(rest)
    assert concepts(dev) | concepts(rest) == concepts(whole)
    assert len(dev) + len(rest) == len(whole)
    assert sorted([*dev.ids, *rest.ids]) == sorted(whole.ids)  # ids are those of the whole: the same draws
    assert [rest.key(i) for i in (0, len(rest) - 1)] == [whole.key(i) for i in np.flatnonzero(np.isin(whole.ids, rest.ids))[[0, -1]]]
    assert rest.quotas == whole.quotas
    order = order_of(rest, 0)
    names = [rest.key(order.at(i)[1]).split("/")[0] for i in range(128)]
    assert names.count("a") == 96
    assert len(concepts(whole)) == len(concepts(open_split(options, "train")))  # the whole is as it was
