"""Questions to a model whose answers are known: figures by hand, controls, balance, kinds, examples."""

import numpy as np
import pytest

from tests.evaluation.colour_generator import (
    COLOURS,
    IMAGE,
    PAD,
    SURE,
    ColourGenerator,
    colour_shard,
    picture_fields,
)
from vlm.config.errors import DataError, RequestError
from vlm.evaluation import VqaOptions, evaluate
from vlm.evaluation.session import Session
from vlm.evaluation.table import table_of
from vlm.evaluation.text_metrics import calibration_error
from vlm.evaluation.vqa import Question, balance, drawn
from vlm.runtime.generation import Negatives


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return colour_shard(tmp_path_factory.mktemp("vqa") / "a.tar")


def ask(uri, generator=None, **options):
    return evaluate(generator or ColourGenerator(), [VqaOptions(resamples=200, **options)], uri)[0]


def test_a_model_that_sees_is_right_and_its_controls_are_not(uri):
    result = ask(uri)
    flat = result.flat()
    assert flat["vqa/exact"] == flat["vqa/color/exact"] == flat["vqa/exists/exact"] == 100
    assert flat["vqa/yes_no/f1"] == 100
    assert flat["vqa/yes_no/yes_rate"] == 50
    # Without a picture it always says red: right for the red quarter.
    assert flat["vqa/none/color/exact"] == 25
    assert flat["vqa/over_none/color/exact"] == 75
    assert result.samples == 24
    assert result.details["questions"] == 72
    assert result.details["kinds"] == {"color": 24, "exists": 48}
    assert result.chance["color"]["exact"] == 25
    assert result.chance["yes_no"] == {"accuracy": 50, "f1": pytest.approx(200 / 3)}
    assert result.details["clusters"] == 4
    assert "over_none" in result.intervals


def test_limber_shuffled_pictures_never_answer_for_their_own_concept(uri):
    result = ask(uri)
    # The picture that is shown has another colour, so a model that reads it says that one.
    assert result.flat()["vqa/shuffled/color/exact"] == 0
    assert result.metrics["over_shuffled"]["color"]["exact"] == 100
    assert result.details["shuffled"] == "permutation"


def test_mistakes_by_hand_with_intervals_by_concept(uri):
    result = ask(uri, ColourGenerator({"blue": "green"}), controls=())
    # Blue pictures: color wrong; "is there blue" no (wrong); "is there OTHER": yes where the other is green.
    # Sample i = 2, 6, 10, ... asks for [red, green, white][i % 3]: two of six are green.
    assert result.metrics["color"]["exact"] == 75
    wrong = 6 + 6 + 2
    assert result.metrics["exact"] == pytest.approx(100 * (72 - wrong) / 72, abs=1e-4)
    tp, fp, fn = 18, 2, 6
    assert result.metrics["yes_no"]["precision"] == pytest.approx(100 * tp / (tp + fp))
    assert result.metrics["yes_no"]["recall"] == pytest.approx(100 * tp / (tp + fn))
    assert result.metrics["yes_no"]["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn), abs=1e-4)
    # Four concepts, one of them all wrong: draws of concepts reach 0 wrong and half wrong.
    assert result.intervals["color"]["exact"] == {"lower": 25.0, "upper": 100.0}
    assert set(result.metrics) == {"exact", "color", "exists", "yes_no"}


def test_the_difference_is_paired(uri):
    result = ask(uri, ColourGenerator({"blue": "green"}), controls=("none",))
    for path in ("exact",):
        main, control = result.metrics[path], result.metrics["none"][path]
        assert result.metrics["over_none"][path] == pytest.approx(main - control, abs=1e-5)


def test_a_batch_and_a_cache_change_nothing(uri):
    whole, small = ColourGenerator({"white": "red"}), ColourGenerator({"white": "red"})
    options = VqaOptions(resamples=100, examples=6)
    first = Session(whole, uri, batch=64).run(options)
    session = Session(small, uri, batch=5)
    samples = session.pictured(session.data_of(None), None, 0)
    samples._cache.clear()
    samples._held, samples.cache_bytes = 0, 100  # two pictures of 48 bytes
    assert session.run(options).as_json() == first.as_json()
    assert whole.prepared == 24
    assert small.prepared > 48
    assert len(samples._cache) == 2


def test_one_drawn_question_and_a_limit(uri):
    result = ask(uri, draw="one", limit=10, seed=3)
    assert result.details["questions"] == result.samples == 10
    assert ask(uri, draw="one", limit=10, seed=3).data["sha256"] == result.data["sha256"]


def question(i, kind, answer):
    return Question(i, f"q{i}", (answer,), kind)


def test_balance_keeps_answers_equally_frequent_within_a_kind():
    many = [question(i, "exists", "yes" if i % 4 else "No.") for i in range(20)]
    many += [question(i, "color", "red" if i % 3 else "blue") for i in range(9)]
    many += [question(1, "lonely", "yes")]
    kept = balance(many, "yes-no", 0)
    answers = [q.answers[0] for q in kept if q.kind == "exists"]
    assert answers.count("yes") == answers.count("No.") == 5
    assert sum(q.kind == "color" for q in kept) == 9
    assert not any(q.kind == "lonely" for q in kept)
    kept = balance(many, "answers", 0)
    answers = [q.answers[0] for q in kept if q.kind == "color"]
    assert answers.count("red") == answers.count("blue") == 3
    assert sum(q.kind == "lonely" for q in kept) == 1
    assert kept != balance(many, "answers", 1)
    once = drawn(many, 0)
    assert sorted(q.sample for q in once) == list(range(20))


def test_single_questions_several_answers_and_one_for_all(tmp_path):
    def fields(i, colour):
        one = {"question": "what color", "answers": [colour, "it"], "kind": "none"}
        return {**one, "name": colour} if i % 2 else {"name": colour}

    uri = colour_shard(tmp_path / "a.tar", 8, fields)
    result = ask(uri, controls=())
    assert result.samples == 4
    # A kind may not be taken for a control.
    assert set(result.metrics) == {"exact", "kind-none"}
    result = ask(uri, controls=(), ask="What color is it?", answer="name")
    assert (result.samples, result.metrics["exact"]) == (8, 100)
    with pytest.raises(DataError, match="no question"):
        ask(uri, questions_from="absent", question="absent")


def test_a_prompt_template_and_its_errors(uri):
    assert ask(uri, prompt="{} the", controls=(), limit=4).metrics["exact"] == 100
    with pytest.raises(ValueError, match="exactly once"):
        VqaOptions(prompt="no place")
    with pytest.raises(ValueError, match="named twice"):
        VqaOptions(controls=("none", "none"))
    with pytest.raises(ValueError, match="temperture"):
        VqaOptions(decoding={"temperture": 1})
    with pytest.raises(RequestError, match="positions"):
        ask(uri, max_new_tokens=99)


def test_debias_lvlm_calibration_of_the_first_token(uri):
    result = ask(uri, ColourGenerator({"blue": "green"}), calibration=True, controls=("none",))
    # "yes" has two spellings in the vocabulary, "no" one.
    e = np.exp(SURE)
    says_yes, says_no = (e + 1) / (e + 2), 1 - 2 / (2 + e)
    confidence, right = [], []
    for i in range(24):
        colour = list(COLOURS)[i % 4]
        seen = {"blue": "green"}.get(colour, colour)
        for asked in picture_fields(i, colour)["questions"][1:]:
            yes = seen in asked["question"]
            confidence.append(says_yes if yes else says_no)
            right.append(yes == (asked["answer"] == "yes"))
    expected = 100 * calibration_error(np.array(confidence), np.array(right))
    assert result.metrics["yes_no"]["calibration_error"] == pytest.approx(expected, abs=1e-4)
    assert result.metrics["none"]["yes_no"]["calibration_error"] > expected


def test_examples_show_failures_beside_successes(uri):
    result = ask(uri, ColourGenerator({"blue": "green"}), examples=10)
    right = [e["right"] for e in result.examples]
    assert right == [False, True] * 5
    assert len({e["key"] for e in result.examples}) == 10
    for example in result.examples:
        assert example["picture"].startswith("data:image/webp")
        assert set(example["controls"]) == {"shuffled", "none"}
        assert example["right"] == (example["answer"] == example["truth"][0])
    # A model without failures has no half of them.
    assert [e["right"] for e in ask(uri, examples=4).examples] == [True] * 4


def test_the_table_has_the_controls_beside_each_figure(uri):
    lines = table_of(ask(uri, ColourGenerator({"blue": "green"}))).splitlines()
    assert lines[0] == f"vqa: 24 samples of {uri}, percent"
    assert lines[1].split("  ")[-1].strip() == "gain over none"
    (color,) = [line for line in lines if line.strip().startswith("color  exact")]
    assert color.split()[:6] == ["color", "exact", "75.0", "25.0", "..", "100.0"]
    assert color.split()[6] == "25.0"  # chance
    assert "25.0  +50.0 (" in color
    assert not any(line.strip().startswith(("none", "over", "shuffled")) for line in lines[2:])


def test_a_share_without_spread_has_an_interval_all_the_same(uri):
    result = ask(uri, controls=())
    for ends in (result.intervals["exact"], result.intervals["yes_no"]["accuracy"], result.intervals["yes_no"]["recall"]):
        assert ends["upper"] == 100
        assert 40 < ends["lower"] < 60  # four concepts say no more
    assert result.intervals["yes_no"]["f1"] == {"lower": 100.0, "upper": 100.0}


def test_drawn_scenes_are_asked_as_they_come():
    class Constant(ColourGenerator):
        def encode(self, text):
            return [3 + sum(map(ord, word)) % len(COLOURS) for word in text.split()]

        def answer(self, prompt):
            return [self.vocabulary.index("red")]

        length = 64

    result = ask("scenes:?n=60&split=val&size=16", Constant(), balance="yes-no")
    assert {"count", "color", "shape", "exists", "relation"} == set(result.details["kinds"])
    share = 100 * 3 / 8
    assert 0 < result.metrics["color"]["exact"] < share
    assert result.metrics["yes_no"]["accuracy"] == 0
    assert result.chance["yes_no"]["accuracy"] == 50
    assert result.metrics["over_shuffled"]["exact"] == 0


class YesSayer(ColourGenerator):
    """Sees whether a thing is there, and leans to yes more than it sees."""

    negatives = Negatives(IMAGE, PAD)
    lean, sight = 3.0, 1.0

    def logits(self, prompt, step):
        if self.text(prompt.ids).split()[:2] != ["is", "there"] or step:
            return super().logits(prompt, step)
        out = np.zeros(self.vocab_size, dtype=np.float32)
        out[[self.vocabulary.index(word) for word in ("yes", "Yes")]] += self.lean
        if prompt.pictures:
            out[self.answer(prompt)[0]] += self.sight
            out[self.vocabulary.index("Yes")] = out[self.vocabulary.index("yes")]
        return out


@pytest.mark.parametrize("decoding", [{"content_free": "none"}, {"content_free": "none+unk"}, {"content_free": "unk", "mode": "identity"}])
def test_debias_lvlm_a_model_that_leans_to_yes_is_set_right(uri, decoding):
    """Answers of its own are all yes: half right. What the picture adds to the words alone is the answer."""
    generator = YesSayer()
    plain = ask(uri, generator, controls=(), calibration=True)
    assert plain.metrics["yes_no"]["yes_rate"] == 100
    assert plain.metrics["yes_no"]["accuracy"] == 50
    corrected = ask(uri, generator, controls=(), calibration=True, decoding={"calibrate": decoding})
    assert corrected.metrics["yes_no"]["accuracy"] == corrected.metrics["exists"]["exact"] == 100
    assert corrected.metrics["yes_no"]["yes_rate"] == 50
    assert corrected.metrics["yes_no"]["calibration_error"] != plain.metrics["yes_no"]["calibration_error"]
    assert corrected.metrics["color"]["exact"] == plain.metrics["color"]["exact"] == 100  # open answers are written as ever


def test_debias_lvlm_calibrate_needs_a_model_whose_pictures_can_be_taken_away(uri):
    with pytest.raises(RequestError, match="calibrate needs a model that reads pictures"):
        ask(uri, ColourGenerator(), controls=(), decoding={"calibrate": {}})
