"""Scene graphs of captions, and the exchanges within them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.corruption import COLORS, SHAPES, SIZES
from vlm.data.scene_graph import parse
from vlm.data.scene_swap import is_symmetric, swapped, swaps
from vlm.data.sources.uri import open_source

MODES = ("relation", "attribute")


def graph(text):
    found = parse(text)
    names = [entity.name for entity in found.entities]
    return names, [(names[i], relation, names[j]) for i, relation, j in found.relations]


@pytest.mark.parametrize(
    ("text", "names", "relations"),
    [
        ("astronaut rides horse", ["astronaut", "horse"], [("astronaut", "rides", "horse")]),
        ("An astronaut rides a horse.", ["astronaut", "horse"], [("astronaut", "rides", "horse")]),
        ("a man is riding a brown horse", ["man", "horse"], [("man", "riding", "horse")]),
        ("a police officer who chases the thief", ["police officer", "thief"], [("police officer", "chases", "thief")]),
        ("there is a small red ring left of a large blue square", ["ring", "square"], [("ring", "left of", "square")]),
        ("a red circle, a blue square and a green star", ["circle", "square", "star"], []),
        ("a picture of a cat on a mat. The mat is red.", ["cat", "mat", "mat"], [("cat", "on", "mat")]),
        ("a lamp next to a bed", ["lamp", "bed"], [("lamp", "next to", "bed")]),
        ("", [], []),
        (", of the and !?", [], []),
        ("riding riding the the the", ["riding"], []),
    ],
)
def test_phrases_are_objects_and_what_stands_between_two_is_their_relation(text, names, relations):
    assert graph(text) == (names, relations)


def test_attributes_stand_before_the_noun_or_behind_is():
    first, second = parse("the large dog is brown and two cats are black").entities
    assert [a.word for a in first.attributes] == ["large", "brown"]
    assert [a.word for a in second.attributes] == ["two", "black"]


def test_triples_are_relations_then_attributes_each_once():
    said = parse("a red circle above a red square, a red circle").triples
    assert said == (("circle", "above", "square"), ("circle", "is", "red"), ("square", "is", "red"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("astronaut rides horse", {"horse rides astronaut"}),
        ("An astronaut rides a horse.", {"A horse rides an astronaut."}),
        ("a red circle left of an orange square", {"an orange square left of a red circle", "an orange circle left of a red square"}),
        ("a small red circle and a large blue star", {"a large red circle and a small blue star", "a small blue circle and a large red star"}),
        ("The dog is brown and the cat is black", {"The dog is black and the cat is brown"}),
    ],
)
def test_exchanges_keep_the_sentence_grammatical(text, expected):
    assert {one.text for one in swaps(text)} == expected


@pytest.mark.parametrize(
    "text",
    [
        "a lamp next to a bed",  # holds both ways
        "a dog playing with a cat",
        "a circle left of a circle",  # identical
        "a red circle above a red circle",
        "a red circle and a blue circle",  # exchanged, the same is said
        "a big dog and a large cat",  # of one meaning
        "one dog and two cats",  # the nouns would have to change
        "a red dog and a small cat",  # of no common kind
        "a group of people",
        "a red circle",
        "",
    ],
)
def test_structure_clip_swap_skips_symmetric_relations_identical_objects_and_what_stays_true(text):
    assert swaps(text) == ()
    assert swapped(text, MODES, 3) is None


def _involutions(text):
    for mode in MODES:
        for one in swaps(text, (mode,)):
            assert one.text.lower() != text.lower()
            assert one.rule == mode
            back = [two.text for two in swaps(one.text, (mode,))]
            assert text in back
            assert sorted(one.text.lower().replace("an ", "a ").split()) == sorted(text.lower().replace("an ", "a ").split())


def test_structure_clip_swap_is_an_involution_and_never_the_original_on_drawn_scenes():
    source = open_source("scenes:?n=60&seed=5")
    texts = {text for index in range(60) for text in source.read(index).fields["captions"]}
    made = 0
    for text in texts:
        plain = text.strip(",.")
        if "," in plain or ":" in plain:  # a comma sticks to a word that moves
            continue
        _involutions(text)
        made += bool(swaps(text))
    assert made > 60


phrases = st.builds(
    lambda article, size, color, shape: " ".join(part for part in (article, size, color, shape) if part),
    st.sampled_from(["a", "the", "this"]), st.sampled_from(["", *SIZES]), st.sampled_from(["", *COLORS]), st.sampled_from(SHAPES),
)  # fmt: skip


@given(phrases, st.sampled_from(["left of", "above", "and", "rides", "is above", "next to", "chasing", "who sees"]), phrases)
def test_structure_clip_swap_is_an_involution_on_made_sentences(one, between, two):
    text = f"{one} {between} {two}"
    for made in swaps(text):
        assert made.text != text
        assert text in {back.text for back in swaps(made.text, (made.rule,))}


@given(st.text(max_size=60))
def test_any_text_can_be_parsed_and_an_exchange_leads_back(text):
    for entity in parse(text).entities:
        assert 0 <= entity.start < entity.stop <= len(text)
    for made in swaps(text):
        assert text in {back.text for back in swaps(made.text, (made.rule,))}


def test_a_draw_is_keyed_and_reaches_every_exchange():
    text = "a small red circle left of a large blue square"
    drawn = [swapped(text, MODES, key) for key in range(200)]
    assert drawn == [swapped(text, MODES, key) for key in range(200)]
    assert {one.text for one in drawn} == {one.text for one in swaps(text)}
    share = np.mean([one.rule == "relation" for one in drawn])
    assert 0.35 < share < 0.65  # the mode is drawn first
    assert {one.rule for one in (swapped(text, ("attribute",), key) for key in range(20))} == {"attribute"}


@pytest.mark.parametrize(("relation", "symmetric"), [("next to", True), ("standing near", True), ("left of", False), ("by", True), ("chased by", False)])
def test_relations_that_hold_both_ways(relation, symmetric):
    assert is_symmetric(relation) is symmetric
