"""Corruption: one thing of the kind named is wrong, never none, and the same draw says the same."""

from __future__ import annotations

import pytest

from vlm.data import open_source
from vlm.data.corruption import _OPPOSITE, KIND_OF, RULES, SHAPES, corrupt, nouns_of

CAPTIONS = [
    "a red circle above a blue square",
    "A large green arrow is at the top left.",
    "there is an orange ring left of a small pink star",
    "A dog on a wooden table. The cat is behind the old chair.",
    "two dogs with a ball",
]
NOUNS = nouns_of(["a dog on a table", "the cat is behind the chair", "a dog and a ball", "a cat", "a table with a ball", "a chair"])


def changed(before: str, after: str) -> tuple[str, str]:
    """What stands between the common beginning and end, in whole words, articles apart."""
    one, two = before.split(), after.split()
    while one and two and one[0] == two[0]:
        one, two = one[1:], two[1:]
    while one and two and one[-1] == two[-1]:
        one, two = one[:-1], two[:-1]
    if one[:1] and two[:1] and {one[0].lower(), two[0].lower()} == {"a", "an"}:
        one, two = one[1:], two[1:]
    return " ".join(one), " ".join(two)


def scene_captions(count=150):
    source = open_source(f"scenes:?n={count}&size=8")
    for i in range(count):
        fields = source.read(i).fields
        yield from [*fields["captions"], fields["description"]]


@pytest.mark.parametrize("rule", RULES)
def test_povid_exactly_one_thing_of_the_kind_is_wrong(rule):
    applied = 0
    for key, text in enumerate([*CAPTIONS, *scene_captions()]):
        wrong = corrupt(text, [rule], key, NOUNS)
        if wrong is None:
            continue
        applied += 1
        assert wrong.rule == rule
        assert wrong.text != text
        before, after = wrong.before.lower(), wrong.after.lower()
        one, two = changed(text, wrong.text)
        assert one.lower().strip(".,") in before
        assert two.lower().strip(".,") in after
        if rule == "attribute":
            assert KIND_OF[before] is KIND_OF[after]
            assert after not in text.lower().split()
        elif rule == "object":
            assert (before in SHAPES) == (after in SHAPES)
            assert before in SHAPES or {before, after} <= set(NOUNS)
            assert after not in text.lower().split()
        else:
            assert _OPPOSITE[before] == after
    assert applied > 100


def test_povid_the_same_draw_says_the_same_and_another_draw_another():
    text = CAPTIONS[0]
    said = [corrupt(text, RULES, key).text for key in range(60)]
    assert said == [corrupt(text, RULES, key).text for key in range(60)]
    assert len(set(said)) > 10
    assert text not in said


def test_povid_another_rule_steps_in_where_one_does_not_apply():
    for key in range(20):
        assert corrupt("a red thing", RULES, key).rule == "attribute"
        assert corrupt("something above", RULES, key).rule == "relation"
    assert corrupt("nothing to see here", RULES, 0) is None
    assert corrupt("a red thing", ["relation"], 0) is None


def test_articles_and_capitals_follow():
    said = {corrupt("a red circle", ["attribute"], key).text for key in range(200)}
    assert "an orange circle" in said
    assert not any(text.startswith(("a orange", "an g", "an b")) for text in said)
    assert all(corrupt("Red circle", ["attribute"], key).text[0].isupper() for key in range(20))
    assert {corrupt("an arrow", ["object"], k).text.split()[0] for k in range(20)} == {"a"}


def test_words_of_one_meaning_are_not_exchanged():
    for key in range(100):
        assert corrupt("a grey dog", ["attribute"], key).after != "gray"
        assert corrupt("a large dog", ["attribute"], key).after not in ("big", "huge")


def test_the_way_back_leads_back():
    for right, wrong in [("left of", "right of"), ("above", "below"), ("in front of", "behind"), ("at the top", "at the bottom")]:
        assert corrupt(f"a dog {right} a cat", ["relation"], 0).text == f"a dog {wrong} a cat"
        assert corrupt(f"a dog {wrong} a cat", ["relation"], 0).text == f"a dog {right} a cat"


def test_nouns_are_the_heads_of_noun_phrases():
    assert set(NOUNS) == {"dog", "table", "cat", "chair", "ball"}
    assert nouns_of([]) == []
    found = nouns_of(scene_captions(60))
    assert set(SHAPES) <= set(found)
    assert not {"red", "large", "left", "the", "there"} & set(found)


def test_the_plural_of_a_word_is_not_another_object():
    nouns = ["dog", "dogs", "cat"]
    assert {corrupt("a dog", ["object"], key, nouns).after for key in range(30)} == {"cat"}
