"""Objects named but absent, by a model whose mistakes are known."""

import numpy as np
import pytest

from tests.evaluation.colour_generator import COLOURS, ColourGenerator, colour_shard
from vlm.config.errors import DataError
from vlm.evaluation import HallucinationOptions, evaluate
from vlm.evaluation.hallucination import Inventory, absent_objects, probes_of

SETTINGS = {"prompt": "describe the picture", "probe": "is there {}", "article": False, "resamples": 200}


def ask(uri, generator=None, **options):
    return evaluate(generator or ColourGenerator(), [HallucinationOptions(**(SETTINGS | options))], uri)[0]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return colour_shard(tmp_path_factory.mktemp("objects") / "a.tar")


def test_povid_absent_objects_by_hand(uri):
    seeing = ask(uri)
    assert seeing.metrics["absent_object_rate"] == seeing.metrics["captions_with_absent"] == 0
    assert seeing.metrics["mentions"] == seeing.metrics["objects_named"] == 1
    assert seeing.metrics["yes_no"]["f1"] == 100
    assert seeing.metrics["yes_no"]["yes_rate"] == 50
    assert (seeing.details["probes"], seeing.details["objects"]) == (48, 4)
    # One colour of four is taken for another, and two are named in every caption.
    mistaken = ask(uri, ColourGenerator({"blue": "green"}, caption="a {} picture there is white"), examples=6)
    absent = 18 + 6  # white where it is not; green for blue
    assert mistaken.metrics["absent_object_rate"] == pytest.approx(100 * absent / 48)
    assert mistaken.metrics["captions_with_absent"] == 75
    assert mistaken.metrics["yes_no"]["recall"] == 75
    assert [e["right"] for e in mistaken.examples] == [False, True] * 3
    assert all(bool(e["absent"]) != e["right"] for e in mistaken.examples)


def test_shuffled_pictures_are_described_wrongly(uri):
    result = ask(uri, controls=("shuffled",))
    assert result.metrics["shuffled"]["absent_object_rate"] == 100
    assert result.metrics["over_shuffled"]["absent_object_rate"] == -100


def test_a_model_that_names_nothing_has_no_rate(uri):
    result = ask(uri, ColourGenerator(caption="a picture"))
    assert "absent_object_rate" not in result.metrics
    assert result.metrics["captions_with_absent"] == result.metrics["mentions"] == 0


def test_either_part_alone(uri):
    assert set(ask(uri, probes=0).metrics) == {"absent_object_rate", "captions_with_absent", "mentions", "objects_named"}
    assert set(ask(uri, captions=False).metrics) == {"yes_no"}
    with pytest.raises(DataError, match="nothing to ask"):
        ask(uri, captions=False, probes=0)
    with pytest.raises(DataError, match="list of objects"):
        ask(uri, objects="caption.none")


def scene(*things):
    return {"objects": [dict(zip(("color", "shape"), thing.split())) for thing in things]}


def test_tables_name_objects_whole_and_by_their_last_keys():
    fields = [scene("red circle", "blue ring"), scene("red ring"), scene()]
    inventory = Inventory(fields, HallucinationOptions())
    assert inventory.full == [["red circle", "blue ring"], ["red ring"], []]
    assert inventory.present[0] == {"red circle", "circle", "blue ring", "ring"}
    assert sorted(inventory.listed) == ["blue circle", "blue ring", "red circle", "red ring"]
    assert inventory.names.named("a blue circle, two rings and a big red ring") == ["blue circle", "ring", "red ring"]


def test_povid_probes_ask_for_as_many_present_as_absent_objects():
    fields = [scene("red circle", "blue ring"), scene("red ring", "blue ring"), scene("red ring", "red circle")] * 5
    options = HallucinationOptions(probes=2)
    inventory = Inventory(fields, options)
    probes = probes_of(inventory, options)
    for number in range(15):
        own = [(name, there) for n, name, there in probes if n == number]
        assert sorted(there for _, there in own) == [False, False, True, True]
        for name, there in own:
            assert there == (name in inventory.present[number])


def test_absent_objects_may_be_the_frequent_or_the_likely_ones():
    fields = [scene("red a", "red b")] * 3 + [scene("red c", "red d")] * 5 + [scene("red a")]
    inventory = Inventory(fields, HallucinationOptions())
    assert set(absent_objects(inventory, "popular", 2, 0)[-1]) == {"red c", "red d"}
    assert absent_objects(inventory, "adversarial", 1, 0)[-1] == ["red b"]
    chosen = {tuple(absent_objects(inventory, "random", 1, seed)[-1]) for seed in range(20)}
    assert len(chosen) == 3
    assert absent_objects(inventory, "random", 99, 0)[-1] != absent_objects(inventory, "random", 99, 1)[-1]


def test_names_of_a_file_with_synonyms(uri, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('[{"name": "red"}, {"name": "green", "synonyms": ["plain"]}]')
    result = ask(uri, ColourGenerator(caption="a plain picture"), names=str(names), probes=0)
    assert result.metrics["mentions"] == 1
    assert result.metrics["absent_object_rate"] == 75  # only a quarter is green


def test_drawn_scenes_have_objects():
    class Constant(ColourGenerator):
        length = 64

        def encode(self, text):
            return [3 + sum(map(ord, word)) % len(COLOURS) for word in text.split()]

        def answer(self, prompt):
            return [self.vocabulary.index(word) for word in ("red", "circle")]

    options = HallucinationOptions(resamples=100)
    result = evaluate(Constant(), [options], "scenes:?n=60&split=val&size=16")[0]
    assert result.details["objects"] == 64
    assert 0 < result.metrics["objects_named"] < 1
    assert result.metrics["absent_object_rate"] == pytest.approx(100 - 100 * result.metrics["objects_named"])
    assert result.metrics["yes_no"]["accuracy"] == 0
    assert np.isfinite(result.metrics["absent_object_rate"])
