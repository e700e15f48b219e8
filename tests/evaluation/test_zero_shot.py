"""Zero-shot against argmax by hand: templates, synonyms, refusals, confusions, class files."""

import json

import numpy as np
import pytest

from vlm.config.errors import DataError, RequestError
from vlm.evaluation.classes import classes_of_values, read_classes, true_classes
from vlm.evaluation.zero_shot import ZeroShotOptions, prompts_of, zero_shot
from vlm.runtime.prompt import plain_name


def options(**kwargs):
    return ZeroShotOptions(**{"labels_from": "label", **kwargs})


def test_equals_argmax_by_hand_with_templates(material):
    generator = np.random.default_rng(0)
    names, templates = ["cat", "dog", "bird"], ("a {}", "one {} here")
    table = {
        t.replace("{}", n): generator.normal(size=5).astype(np.float32) for n in names for t in templates
    }
    labels = [names[i] for i in generator.integers(0, 3, 60)]
    m = material(generator.normal(size=(60, 5)), labels, [{"label": label} for label in labels], table)
    result = zero_shot(m, options(templates=templates))
    vectors = []
    for n in sorted(names):
        rows = [table[t.replace("{}", n)] for t in templates]
        mean = np.mean([r / np.linalg.norm(r) for r in rows], axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    answers = [sorted(names)[int(np.argmax(vectors @ image))] for image in m.images]
    wanted = 100 * np.mean([a == label for a, label in zip(answers, labels)])
    assert result.metrics["top1"] == pytest.approx(wanted, abs=1e-4)
    assert result.metrics["top5"] == 100.0
    assert result.chance == {
        "top1": pytest.approx(100 / 3),
        "top5": 100.0,
        "mean_per_class": pytest.approx(100 / 3),
    }
    confusion = result.details["confusion"]
    for row, true in enumerate(confusion["classes"]):
        for column, said in enumerate(confusion["classes"]):
            count = sum(a == said and label == true for a, label in zip(answers, labels))
            assert confusion["counts"][row][column] == count


@pytest.mark.parametrize("reduce", ["score-mean", "score-max", "embedding-mean"])
def test_reductions_over_prompts_by_hand(material, tmp_path, reduce):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([{"name": "a", "synonyms": ["a2"]}, {"name": "b"}]))
    table = {"a": [1.0, 0, 0], "a2": [0, 1.0, 0], "b": [0.8, 0.6, 0]}
    m = material([[0.0, 1, 0], [1, 0.9, 0]], ["a", "b"], [{"label": "a"}, {"label": "b"}], table)
    result = zero_shot(m, options(classes=str(path), reduce=reduce))
    prompts = np.array(list(table.values()))
    right = 0
    for image, truth in zip(m.images, (0, 1)):
        scores = prompts @ image
        if reduce == "score-max":
            a = max(scores[:2])
        elif reduce == "score-mean":
            a = scores[:2].mean()
        else:
            a = (prompts[:2].mean(0) / np.linalg.norm(prompts[:2].mean(0))) @ image
        right += int(scores[2] > a) == truth
    assert result.metrics["top1"] == 50.0 * right


def test_a_tie_with_the_true_class_is_a_miss(material):
    m = material([[1, 0], [0, 1]], ["a", "c"], [{"label": "a"}, {"label": "c"}], {"a": [1, 0], "c": [1, 0]})
    assert zero_shot(m, options()).metrics["top1"] == 0.0


def test_none_of_these_counts_refusals(material, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("a\nb\n")
    table = {"a": [1.0, 0, 0], "b": [0, 1.0, 0]}
    images = [[1, 0, 0], [0, 1, 0], [0.1, 0.12, 1], [0.12, 0.1, 1]]
    fields = [{"label": x} for x in ("a", "b", "a", "zebra")]
    m = material(images, ["w", "x", "y", "z"], fields, table)
    result = zero_shot(m, options(classes=str(path), none_below=0.9))
    assert result.metrics["coverage"] == 50.0  # the last two are unsure: scale 10, cosines nearly equal
    assert result.metrics["accuracy_answered"] == 100.0
    assert result.metrics["none_recall"] == 100.0
    assert result.metrics["accuracy_with_none"] == 75.0
    assert result.details["outside"] == 1
    assert result.samples == 4


def test_sigmoid_models_answer_by_their_own_probability(material):
    m = material([[1, 0], [0, 1]], ["a", "b"], [{"label": "a"}, {"label": "b"}], {"a": [1, 0], "b": [0, 1]})
    m.embedder.form, m.embedder.bias = "sigmoid", -12.0  # scale 10: sigmoid(10 - 12) = 0.12
    assert zero_shot(m, options(none_below=0.1)).metrics["coverage"] == 100.0
    assert zero_shot(m, options(none_below=0.2)).metrics["coverage"] == 0.0


def test_most_confused_pairs(material):
    table = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
    images = [[0, 1, 0]] * 3 + [[0, 0, 1]] + [[0, 1, 0], [0, 0, 1]]
    labels = ["a"] * 4 + ["b", "c"]
    result = zero_shot(material(images, labels, [{"label": x} for x in labels], table), options())
    assert result.details["confused"][0] == {"true": "a", "answered": "b", "count": 3, "share": 0.75}
    assert {row["class"]: row["top1"] for row in result.details["per_class"]} == {
        "a": 0.0,
        "b": 100.0,
        "c": 100.0,
    }


def test_the_caption_itself_can_be_the_class(material):
    m = material([[1, 0], [0, 1]], ["a", "b"], None, {"a": [1, 0], "b": [0, 1]})
    assert zero_shot(m, options(labels_from="caption")).metrics["top1"] == 100.0


def test_plain_names_and_clashes():
    assert plain_name("vehicles/fire_truck") == "fire truck"
    names = {e.label: e.names[0] for e in classes_of_values(["a/other", "b/other", "c/new-one"])}
    assert names == {"a/other": "a other", "b/other": "b other", "c/new-one": "new one"}


def test_prompts_are_templates_by_names():
    entries = classes_of_values(["x", "y"])
    prompts, owner = prompts_of(entries, ("a {}", "{}!"))
    assert prompts == ["a x", "x!", "a y", "y!"]
    assert owner.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "0 classes"),
        ("one\n", "1 classes"),
        ("a\na\n", "listed twice"),
        ("[1, 2]", "a class is int"),
        ('[{"nam": "x"}, "y"]', "unknown key 'nam'"),
        ("{broken", "is not JSON"),
        ('["a", ["", "b"]]', "expected text"),
    ],
)
def test_bad_class_files_name_the_file(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_classes(path)
    assert str(path) in str(caught.value)


def test_a_file_of_several_lists_wants_a_choice(tmp_path):
    path = tmp_path / "all.json"
    lists = {
        "group": {"G": {"name": "gee", "members": {"p": ["k0"]}}, "H": {"name": "aitch", "members": ["k1"]}}
    }
    path.write_text(json.dumps({"set": "x", "protocols": lists}))
    with pytest.raises(RequestError, match=r"all\.json#group"):
        read_classes(path)
    classes = read_classes(f"{path}#group")
    found, source = true_classes(classes, ["shard:k1", "s/k0", "k9"], [{}] * 3, None)
    assert (found, source) == ([1, 0, -1], "members")


def test_nothing_in_common_is_one_clear_error(material, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("left\nright\n")
    m = material([[1, 0]], ["up"], [{"category": "north"}])
    with pytest.raises(DataError, match="no sample belongs to one of the 2 classes") as caught:
        zero_shot(m, ZeroShotOptions(classes=str(path)))
    assert "--labels-from" in str(caught.value)


def test_options_ask_for_classes_and_one_place_in_a_template():
    with pytest.raises(ValueError, match="zero-shot needs classes"):
        ZeroShotOptions()
    with pytest.raises(ValueError, match="exactly once"):
        options(templates=("no place",))
