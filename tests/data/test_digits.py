"""Drawn digits: what is said of a picture is true of it, splits never share a number, each digit is where its box is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlm.config.errors import DataError
from vlm.data import open_source
from vlm.data.scenes.layout import split_of
from vlm.runtime.pictures import DEFAULT_LIMITS
from vlm.runtime.tiling import Tiling


def fields_of(uri, count):
    source = open_source(uri)
    return [source.read(i).fields for i in range(count)]


def test_digits_are_repeatable_and_seeds_differ():
    one, two, other = fields_of("digits:?n=20", 20), fields_of("digits:?n=20", 20), fields_of("digits:?n=20&seed=1", 20)
    assert all(np.array_equal(np.asarray(a["image"]), np.asarray(b["image"])) for a, b in zip(one, two))
    assert [a["questions"] for a in one] == [b["questions"] for b in two]
    assert sum(a["number"] == b["number"] for a, b in zip(one, other)) <= 2
    assert {field["image"].size for field in one} == {(128, 64)}
    short, long = open_source("digits:?n=5"), open_source("digits:?n=500")
    assert np.array_equal(short.ids, long.ids[:5])


@pytest.mark.parametrize("length", [2, 4])
def test_splits_share_no_number_whatever_the_seed(length):
    parts = {
        split: {f["number"] for f in fields_of(f"digits:?n=300&seed={seed}&split={split}&length={length}&width=32&height=8", 300)}
        for split, seed in (("train", 0), ("val", 0), ("test", 5))
    }
    assert not parts["train"] & parts["val"]
    assert not parts["train"] & parts["test"]
    assert not parts["val"] & parts["test"]
    assert all({len(number) for number in numbers} == {length} for numbers in parts.values())
    assert all(split_of(number) == split for split, numbers in parts.items() for number in numbers)


def test_answers_are_true_and_balanced():
    said, first = Counter(), Counter()
    for fields in fields_of("digits:?n=1500&width=16&height=8", 1500):
        number = fields["number"]
        assert fields["concept"] == number
        assert all(text.replace(" ", "").endswith(number) for text in fields["captions"])
        assert fields["caption"] in fields["captions"]
        *positions, exists = fields["questions"]
        for k, question in enumerate(positions, start=1):
            assert question == {"kind": "position", "question": f"what is the digit at position {k}?", "answer": number[k - 1]}
        assert len(positions) == len(number) == 4
        asked = exists["question"].removesuffix("?").split()[-1]
        assert exists["answer"] == ("yes" if asked in number else "no")
        said[exists["answer"]] += 1
        first[number[0]] += 1
    assert abs(said["yes"] - 750) < 100
    assert len(first) == 10
    assert min(first.values()) > 100


def test_all_digits_in_a_number_leave_no_wrong_question():
    for fields in fields_of("digits:?n=20&length=64&width=512&height=8", 20):
        if len(set(fields["number"])) == 10:
            assert fields["questions"][-1]["answer"] == "yes"


@pytest.mark.parametrize(("width", "height", "length"), [(128, 64, 4), (64, 64, 3), (192, 64, 7), (64, 128, 2)])
def test_each_digit_is_drawn_inside_its_box_and_nothing_outside(width, height, length):
    for fields in fields_of(f"digits:?n=40&length={length}&width={width}&height={height}", 40):
        pixels = np.asarray(fields["image"]).astype(int)
        assert pixels.shape == (height, width, 3)
        ink = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        outside = ink.copy()
        for x0, y0, x1, y1 in fields["boxes"]:
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            pad = 1 + 0.1 * (y1 - y0) * height  # half the line is outside
            rows = slice(max(0, int(y0 * height - pad)), int(y1 * height + pad) + 1)
            columns = slice(max(0, int(x0 * width - pad)), int(x1 * width + pad) + 1)
            assert ink[rows, columns].sum() > 8
            outside[rows, columns] = False
        assert not outside.any()


def test_digits_look_alike_only_where_they_are_the_same():
    """The nearest other picture of one digit, brought to one place, is of the same digit far more often than by chance."""
    seen = []
    for fields in fields_of("digits:?n=80&length=4", 80):
        grey = np.asarray(fields["image"].convert("L")).astype(float)
        for digit, (x0, y0, x1, y1) in zip(fields["number"], fields["boxes"]):
            box = (x0 * 128, y0 * 64, x1 * 128, y1 * 64)
            part = np.asarray(fields["image"].convert("L").resize((12, 20), box=box)).astype(float) - grey[0, 0]
            seen.append((digit, part.ravel() / np.linalg.norm(part)))
    names, rows = [digit for digit, _ in seen], np.stack([row for _, row in seen])
    near = rows @ rows.T
    np.fill_diagonal(near, -1)
    right = np.mean([names[i] == names[j] for i, j in enumerate(near.argmax(1))])
    assert right > 0.95


def test_nvlm_the_pictures_are_two_tiles_and_a_thumbnail():
    fields = fields_of("digits:?n=1", 1)[0]
    assert len(Tiling(64).cut(fields["image"])) == 3


@pytest.mark.parametrize("uri", ["digits:?n=0", "digits:?length=1", "digits:?split=dev", "digits:?size=64", "digits:?nonsense"])
def test_wrong_options_are_named(uri):
    with pytest.raises(DataError, match=r"digits:"):
        open_source(uri)


def test_the_reader_gives_the_fields_without_the_picture():
    from vlm.data.sources.readers import open_reader

    source = open_source("digits:?n=3&seed=2&split=val")
    reader = open_reader(source.spec(), DEFAULT_LIMITS)
    for index in range(3):
        whole = source.read(index)
        assert whole.key == f"digits-val-2:{index}"
        assert reader.fields(source.recipe(index)) == {k: v for k, v in whole.fields.items() if k != "image"}
