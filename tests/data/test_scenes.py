"""Drawn scenes: what is said of a picture is true of it, splits never share a composition, answers are balanced."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlm.config.errors import DataError
from vlm.data import open_source
from vlm.data.scenes.language import long_caption, sentence, sized
from vlm.data.scenes.layout import COLORS, OPPOSITE, compose, scene_generator


def fields_of(uri, count):
    source = open_source(uri)
    return [source.read(i).fields for i in range(count)]


def composition(fields):
    cells = [tuple(int(c * 3) for c in ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2)) for b in fields["boxes"]]
    return frozenset((o["shape"], o["color"], o["size"], c) for o, c in zip(fields["objects"], cells))


def test_scenes_are_repeatable_and_seeds_differ():
    one, two = fields_of("scenes:?n=20", 20), fields_of("scenes:?n=20", 20)
    other = fields_of("scenes:?n=20&seed=1", 20)
    assert all(np.array_equal(np.asarray(a["image"]), np.asarray(b["image"])) for a, b in zip(one, two))
    assert [a["captions"] for a in one] == [b["captions"] for b in two]
    assert sum(a["captions"] == b["captions"] for a, b in zip(one, other)) <= 2


def test_a_longer_set_begins_with_the_shorter_one():
    short, long = open_source("scenes:?n=5"), open_source("scenes:?n=500")
    assert np.array_equal(short.ids, long.ids[:5])
    assert short.read(4).fields["captions"] == long.read(4).fields["captions"]


def test_splits_share_no_composition_whatever_the_seed():
    parts = [
        {composition(f) for f in fields_of(f"scenes:?n=400&seed={seed}&split={split}&size=8", 400)}
        for split, seed in (("train", 0), ("val", 0), ("test", 5))
    ]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


@pytest.mark.parametrize("size", [64, 96])
def test_each_object_shows_its_color_inside_its_box_and_nowhere_else(size):
    for fields in fields_of(f"scenes:?n=60&size={size}", 60):
        pixels = np.asarray(fields["image"]).astype(int)
        outside = np.ones((size, size), bool)
        for thing in fields["objects"]:
            x0, y0, x1, y1 = (v * size for v in thing["box"])
            inside = pixels[max(0, int(y0)) : int(y1) + 2, max(0, int(x0)) : int(x1) + 2]
            distance = np.abs(inside - np.array(COLORS[thing["color"]])).sum(-1)
            assert (distance < 40).sum() >= 3, thing
            outside[max(0, int(y0) - 1) : int(y1) + 3, max(0, int(x0) - 1) : int(x1) + 3] = False
        assert len(np.unique(pixels[outside].reshape(-1, 3), axis=0)) == 1


def test_relations_are_true_of_the_boxes_and_come_in_pairs():
    for fields in fields_of("scenes:?n=200&size=8", 200):
        centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in fields["boxes"]]
        said = {tuple(relation) for relation in fields["relations"]}
        for i, name, j in said:
            axis = 0 if name in ("left of", "right of") else 1
            smaller = name in ("left of", "above")
            assert (centres[i][axis] < centres[j][axis]) == smaller
            assert (j, OPPOSITE[name], i) in said


def test_the_main_object_is_named_in_every_caption_and_no_other_is_as_large():
    order = {"small": 0, "medium": 1, "large": 2}
    for fields in fields_of("scenes:?n=200&size=8", 200):
        assert all(fields["name"] in caption for caption in fields["captions"])
        assert fields["caption"] in fields["captions"]
        assert len(set(fields["captions"])) == len(fields["captions"]) >= 4
        sizes = [order[o["size"]] for o in fields["objects"]]
        assert all(other < sizes[0] for other in sizes[1:])
        assert len({(o["shape"], o["color"]) for o in fields["objects"]}) == fields["count"] == len(sizes)


def test_answers_are_true_and_balanced():
    answers: dict[str, Counter[str]] = {}
    for fields in fields_of("scenes:?n=1500&size=8", 1500):
        names = {f"{o['color']} {o['shape']}" for o in fields["objects"]}
        for q in fields["questions"]:
            answers.setdefault(q["kind"], Counter())[q["answer"]] += 1
            if q["kind"] == "exists":
                asked = q["question"].removeprefix("is there ").split(" ", 1)[1].rstrip("?")
                assert (asked in names) == (q["answer"] == "yes")
            if q["kind"] == "color":
                assert any(
                    o["color"] == q["answer"] and o["shape"] in q["question"] for o in fields["objects"]
                )
    for kind in ("exists", "relation"):
        yes, no = answers[kind]["yes"], answers[kind]["no"]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5
    for kind in ("shape", "color", "count"):
        counts = answers[kind].values()
        assert max(counts) < 1.6 * min(counts), kind


def test_the_inventory_says_each_object_once_in_reading_order():
    """Its phrases follow the cells of the grid, row by row."""
    from vlm.data.scenes.language import inventory

    for scene in (compose(scene_generator(1, i), "train") for i in range(50)):
        text = inventory(scene)
        places = [text.index(sized(thing)) for thing in sorted(scene.things, key=lambda thing: thing.cell)]
        assert places == sorted(places)
        assert text.count(" at the ") + text.count(" on the ") + text.count(" in the ") == len(scene.things)


def test_a_dialogue_asks_each_thing_once_and_ends_with_what_is_there():
    for fields in fields_of("scenes:?n=60", 60):
        asked = [entry["question"] for entry in fields["dialogue"]]
        assert len(set(asked)) == len(asked)
        assert fields["dialogue"][: len(fields["questions"])] == fields["questions"]
        assert fields["dialogue"][-1]["answer"] == fields["inventory"]
        own = fields["dialogue"][len(fields["questions"]) : -1]
        assert len(own) <= 4
        assert all(entry in fields["attributes"] for entry in own)
        assert all(fields["shape"] in str(entry) for entry in own if entry["kind"] != "place"), own


def test_attributes_ask_what_one_object_answers():
    """Every answer is that of exactly one object, found again in the fields of the scene."""
    kinds = Counter()
    for fields in fields_of("scenes:?n=60", 60):
        for asked in fields["attributes"]:
            kinds[asked["kind"]] += 1
            kind, answer, words = asked["kind"], asked["answer"], asked["question"].rstrip("?").split()
            if kind == "place":
                assert f"{answer.split(' ', 1)[1]} {' '.join(words[2:])}" in fields["inventory"], asked
                continue
            addressed = [o for o in fields["objects"] if all(o[k] in words for k in ("color", "shape") if k != kind)]
            assert [o[kind] for o in addressed] == [answer], asked
    assert set(kinds) == {"shape", "color", "size", "place"}


def test_the_description_names_every_object():
    scene = compose(scene_generator(1, 2), "train")
    from vlm.data.scenes.language import description

    assert all(sized(thing) in description(scene).lower() for thing in scene.things)


@pytest.mark.parametrize(
    "uri", ["scenes:?n=0", "scenes:?n=x", "scenes:?split=dev", "scenes:?sise=64", "scenes:?nonsense"]
)
def test_wrong_options_are_named(uri):
    with pytest.raises(DataError, match=r"scenes:"):
        open_source(uri)


def test_dreamlip_a_long_caption_says_each_object_once_then_neighbours_truly():
    from vlm.data.captions import sentences

    for i in range(80):
        scene = compose(scene_generator(4, i), "train")
        parts = sentences(long_caption(scene), [".", "\n"])
        things = scene.things
        assert parts[: len(things)] == [sentence(thing) for thing in things]
        assert len(parts) == 2 * len(things) - 1
        for k, said in enumerate(parts[len(things) :]):
            first, second = things[k], things[k + 1]
            name = said.removeprefix(f"The {first.name} is ").removesuffix(f" the {second.name}.")
            column, row = first.cell % 3 - second.cell % 3, first.cell // 3 - second.cell // 3
            assert {"left of": column < 0, "right of": column > 0, "above": row < 0, "below": row > 0}[name]
    for fields in fields_of("scenes:?n=20", 20):
        assert [entry["sentence"] for entry in fields["objects"]] == sentences(fields["long_caption"], ["."])[: fields["count"]]
