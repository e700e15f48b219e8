"""Classes by what can be seen of them: means of scores, controls, explanations. Source: dclip."""

import json

import numpy as np
import pytest

from vlm.config.errors import DataError
from vlm.evaluation.classes import classes_of_values
from vlm.evaluation.zero_shot import ZeroShotOptions, class_scores, explained, prompts_of, zero_shot
from vlm.runtime.descriptors import controlled_table, described, descriptors_of, phrase, read_descriptors

TABLE = {
    "crow": ("black feathers", "a strong beak", "can fly"),
    "red_fox": ("a bushy tail",),
    "owl": ("large round eyes", "has feathers"),
}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def scored(table, reduce, seed=0, images=40, width=6):
    """(scores [n, C], image rows, text rows, owner, texts) with a random direction for each text."""
    entries = classes_of_values(list(table))
    texts, owner = prompts_of(entries, None, table=table)
    draw = np.random.default_rng(seed)
    pictures = unit(draw.normal(size=(images, width)))
    directions = dict(zip(dict.fromkeys(texts), unit(draw.normal(size=(len(texts), width)))))
    rows = np.stack([directions[text] for text in texts])
    return class_scores(pictures, rows, owner, reduce), pictures, rows, owner, texts


def test_dclip_one_descriptor_equals_plain_zero_shot_with_that_text():
    one = {label: phrases[:1] for label, phrases in TABLE.items()}
    results = [scored(one, reduce)[0] for reduce in ("score-mean", "score-max", "embedding-mean")]
    entries = classes_of_values(list(TABLE))
    texts, _ = prompts_of(entries, None, table=one)
    assert texts == ["crow, which has black feathers", "owl, which has large round eyes", "red fox, which is a bushy tail"]
    _, pictures, rows, *_ = scored(one, "score-mean")
    for result in results:
        np.testing.assert_allclose(result, pictures @ rows.T, atol=1e-6)


def test_dclip_the_mean_of_scores_is_the_score_of_the_mean_and_its_norm_is_what_differs():
    mean, pictures, rows, owner, _ = scored(TABLE, "score-mean")
    other = scored(TABLE, "embedding-mean")[0]
    centres = np.stack([rows[owner == c].mean(0) for c in range(3)])
    np.testing.assert_allclose(mean, pictures @ centres.T, atol=1e-6)
    np.testing.assert_allclose(other, mean / np.linalg.norm(centres, axis=1), atol=1e-6)
    assert np.abs(other - mean).max() > 0.05
    assert (other.argmax(1) != mean.argmax(1)).any()


def test_dclip_more_descriptors_of_a_class_are_no_advantage():
    twice = {**TABLE, "crow": TABLE["crow"] * 2}
    for reduce in ("score-mean", "score-max", "embedding-mean"):
        before = scored(TABLE, reduce)[0]
        texts, owner = prompts_of(classes_of_values(list(TABLE)), None, table=twice)
        assert len(texts) == 9
        _, pictures, rows, _, said = scored(TABLE, reduce)
        by_text = dict(zip(said, rows))
        after = class_scores(pictures, np.stack([by_text[text] for text in texts]), owner, reduce)
        np.testing.assert_allclose(after, before, atol=1e-6)


def test_dclip_an_explanation_adds_up_to_the_score():
    scores, pictures, rows, owner, texts = scored(TABLE, "score-mean")
    for c, label in enumerate(["crow", "owl", "red fox"]):
        why = explained(pictures[0], rows, owner, texts, c)
        assert len(why) == len(TABLE[label.replace(" ", "_")])
        assert all(reason["text"].startswith(f"{label}, which ") for reason in why)
        assert [reason["score"] for reason in why] == sorted((reason["score"] for reason in why), reverse=True)
        assert np.mean([reason["score"] for reason in why]) == pytest.approx(scores[0, c], abs=1e-6)


def test_dclip_another_list_is_another_rule():
    before = scored(TABLE, "score-mean")[0]
    entries = classes_of_values(list(TABLE))
    _, pictures, rows, _, said = scored(TABLE, "score-mean")
    fewer = {**TABLE, "crow": TABLE["crow"][:1]}
    texts, owner = prompts_of(entries, None, table=fewer)
    by_text = dict(zip(said, rows))
    after = class_scores(pictures, np.stack([by_text[text] for text in texts]), owner, "score-mean")
    np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=1e-6)
    assert np.abs(after[:, 0] - before[:, 0]).max() > 0.05


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a bushy tail", "which is a bushy tail"),
        ("An orange coat", "which is An orange coat"),
        ("antlers", "which has antlers"),
        ("four legs", "which has four legs"),
        ("has four legs", "which has four legs"),
        ("can fly", "which can fly"),
        ("often near water", "which often near water"),
        ("used for digging", "which is used for digging"),
        ("with a long neck", "with a long neck"),
    ],
)
def test_a_descriptor_goes_on_after_the_name(given, said):
    assert phrase(given) == said
    assert described("a photo of a fox", [given]) == [f"a photo of a fox, {said}"]


def test_a_class_without_descriptors_is_its_name_and_one_that_is_missing_is_an_error():
    assert described("a fox", ()) == ["a fox"]
    assert descriptors_of({"Red_Fox": ("x",)}, "a/red-fox") == ("x",)
    assert descriptors_of({"fox": ("x",)}, "n02", ["wolf", "fox"]) == ("x",)
    with pytest.raises(DataError, match="class 'wolf' has no descriptors"):
        descriptors_of(TABLE, "wolf")


@pytest.mark.parametrize("content", ["[]", "{", '{"a": "b"}', '{"a": [1]}', '{"a": [" "]}', "{}"])
def test_files_that_hold_no_descriptors_are_named(tmp_path, content):
    path = tmp_path / "seen.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"seen\.json"):
        read_descriptors(str(path))
    with pytest.raises(DataError, match="absent"):
        read_descriptors(str(tmp_path / "absent.json"))


def test_dclip_controls_say_nothing_of_their_class():
    words = controlled_table(TABLE, "random-words", 0)
    known = {word for phrases in TABLE.values() for one in phrases for word in one.split()}
    assert {label: [len(one.split()) for one in own] for label, own in words.items()} == {
        label: [len(one.split()) for one in own] for label, own in TABLE.items()
    }
    assert {word for own in words.values() for one in own for word in one.split()} <= known
    assert words == controlled_table(TABLE, "random-words", 0)
    assert words != controlled_table(TABLE, "random-words", 1)
    assert controlled_table(TABLE, "names", 0) == {"crow": (), "red_fox": (), "owl": ()}
    others = controlled_table(TABLE, "other-class", 0)
    assert sorted(others.values()) == sorted(TABLE.values())
    assert all(others[label] != TABLE[label] for label in TABLE)


def test_dclip_a_task_reads_a_file_and_keeps_what_speaks_for_its_answers(material, tmp_path):
    path = tmp_path / "seen.json"
    path.write_text(json.dumps({"a": ["has one", "has two"], "b": ["has three"]}))
    table = {"a, which has one": [1.0, 0, 0], "a, which has two": [0, 1.0, 0], "b, which has three": [0.7, 0.7, 0.2]}
    images, fields = [[1.0, 0.9, 0], [0.1, 0.1, 1.0]], [{"label": "a"}, {"label": "b"}]
    m = material(images, ["x", "y"], fields, table)
    result = zero_shot(m, ZeroShotOptions(labels_from="label", descriptors=str(path), examples=2, explain=1))
    rows = unit(np.array(list(table.values())))
    scores = np.stack([(unit(np.array(images)) @ rows[:2].T).mean(1), unit(np.array(images)) @ rows[2]], 1)
    assert result.metrics["top1"] == 50.0 * ((scores[0, 0] > scores[0, 1]) + (scores[1, 1] > scores[1, 0]))
    assert result.details["descriptors"] == {"texts": 3, "fewest": 1, "most": 2}
    for example in result.examples:
        assert len(example["why"]) == 1
        assert example["why"][0]["text"].startswith(example["found"][0]["text"])


def test_dclip_the_same_table_may_stand_in_a_preset(material):
    m = material([[1.0, 0], [0, 1.0]], ["x", "y"], [{"label": "a"}, {"label": "b"}], {"a, which has x": [1.0, 0.1], "b": [0.1, 1.0]})
    options = ZeroShotOptions.model_validate({"labels_from": "label", "descriptors": {"a": ["x"], "b": []}})
    assert options.reduction == "score-mean"
    assert zero_shot(m, options).metrics["top1"] == 100.0
    with pytest.raises(ValueError, match="controls is read only where there are descriptors"):
        ZeroShotOptions(labels_from="label", controls=("other-class",))
