"""Bundles that write: the stepper equals torch's, whatever the batch, the pictures and the padding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.answering_fixtures import answering_bundle, bundle_of, golden_of, random_prompts, torch_of
from tests.bundle_fixtures import exported
from vlm.config.errors import CheckpointError, DataError, GateFailed, RequestError
from vlm.runtime import open_any_bundle
from vlm.runtime.chat import Message, PicturePart
from vlm.runtime.generation import Contrast, Decoding, Generator, Prompt, Request, Rolling, Stepper, generate
from vlm.runtime.stepper import most_kept

KINDS = ["prefix", "cross", "drop", "tiles", "tiles-beside", "tiles-apart", "language"]


def both(kind, count, seed=0):
    generators = bundle_of(kind), torch_of(kind)
    return *generators, *random_prompts(*generators, count, seed, pictures=kind != "language", same_pixels=kind.startswith("drop"))


def check_greedy(kind, count, seed, steps):
    ours, theirs, mine, yours = both(kind, count, seed)
    assert [ours.positions(p) for p in mine] == [theirs.positions(p) for p in yours]
    wanted = generate(theirs, yours, Decoding(max_new_tokens=steps), batch_size=3)
    for batch in (1, 3):
        assert generate(ours, mine, Decoding(max_new_tokens=steps), batch_size=batch) == wanted
    assert len({answer.ids for answer in wanted}) > count // 2


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_torch(kind):
    check_greedy(kind, 12, 3, 8)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "drop-keep"])
def test_greedy_tokens_of_fifty_prompts_are_those_of_torch(kind):
    check_greedy(kind, 50, 11, 9 if kind == "language" else 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_s_logits_do_not_depend_on_the_rows_beside_it(kind):
    ours, _, prompts, _ = both(kind, 6)
    assert isinstance(ours, Generator)
    together = ours.stepper()
    assert isinstance(together, Stepper)
    logits = together.start(prompts)
    alone = [ours.stepper() for _ in prompts]
    for row, stepper in enumerate(alone):
        assert np.allclose(stepper.start(prompts[row : row + 1])[0], logits[row], atol=1e-4)
    index = np.array([4, 4, 0, 1])
    together.reorder(index)
    ids = np.array([5, 9, 5, 17])
    logits = together.advance(ids)
    again = together.advance(ids + 1)
    for place, (row, token) in enumerate(zip(index, ids)):
        stepper = ours.stepper()
        stepper.start([prompts[row]])
        assert np.allclose(stepper.advance(np.array([token]))[0], logits[place], atol=1e-4)
        assert np.allclose(stepper.advance(np.array([token + 1]))[0], again[place], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [0, 1], ids=["onnx", "torch"])
def test_rows_that_join_later_write_what_they_write_alone(kind, side):
    given = both(kind, 6, seed=8)
    generator, prompts = given[side], given[2 + side]
    decoding = Decoding(max_new_tokens=9)
    rolling = Rolling(generator)
    rows = [rolling.add([Request(prompt, decoding, i) for i, prompt in enumerate(prompts[:2])])]
    tokens = {row: [] for row in range(len(prompts))}
    steps = 0
    while len(rolling):
        for event in rolling.step():
            tokens[event.row].append(event.token)
        steps += 1
        if steps in (2, 3):  # one short of the others, then the rest; earlier rows are behind by one and two tokens
            first = 2 if steps == 2 else 3
            rows.append(rolling.add([Request(p, decoding, i) for i, p in enumerate(prompts[first : first + 2 * steps - 3], first)]))
    assert rows == [[0, 1], [2], [3, 4, 5]]
    for row, prompt in enumerate(prompts):
        whole = generate(generator, [prompt], decoding)[0]
        assert tuple(t for t in tokens[row] if t not in generator.eos_ids) == whole.ids


@pytest.mark.parametrize("kind", KINDS)
def test_nats_are_those_of_torch(kind):
    ours, theirs, mine, yours = both(kind, 5, seed=2)
    answers = [[7, 9, 30], [], "red", [4], "a blue"]
    for got, wanted in zip(ours.nats(mine, answers), theirs.nats(yours, answers), strict=True):
        assert got.shape == wanted.shape
        assert np.allclose(got, wanted, atol=5e-3)  # the graph that prepares pictures may differ by a level


@pytest.mark.parametrize("strategy", ["beam", "sample"])
def test_beams_and_draws_are_those_of_torch(strategy):
    ours, theirs, mine, yours = both("prefix", 4, seed=5)
    decoding = Decoding(strategy=strategy, beams=3, max_new_tokens=6, seed=3, temperature=1.3, early_stopping=False)
    answers = generate(ours, mine, decoding)
    wanted = generate(theirs, yours, decoding)
    assert [a.ids for a in answers] == [a.ids for a in wanted]


@pytest.mark.parametrize("kind", ["prefix", "cross"])
def test_a_second_branch_reads_the_prompt_without_its_pictures(kind):
    ours, theirs, mine, yours = both(kind, 3, seed=6)
    decoding = Decoding(max_new_tokens=6, contrast=Contrast("none+unk", alpha=0.7))
    answers = generate(ours, mine, decoding, negatives=ours.negatives)
    assert [a.ids for a in answers] == [a.ids for a in generate(theirs, yours, decoding, negatives=theirs.negatives)]
    assert answers[1:] != generate(ours, mine, Decoding(max_new_tokens=6))[1:]


def test_pyramiddrop_layers_hold_the_positions_that_torch_keeps():
    """The stages of the cache are as long as those of the model, and shrink as the preset says."""
    ours, theirs, mine, yours = both("drop", 6)
    for a, b in zip(mine, yours):
        stepper = ours.stepper()
        stepper.start([a])
        stages = [int(mask.sum()) for mask in stepper._masks]
        assert [stages[stage] for stage in stepper.graphs.shape.stages] == theirs.kept(b)
        shown = len(a.pictures.get("image", ()))
        assert stages == [len(a.ids) + 3 * shown, len(a.ids) + shown, len(a.ids)]


def test_pyramiddrop_keeps_a_picture_that_no_text_follows():
    ours, theirs = bundle_of("drop"), torch_of("drop")
    shown = [g.prepare_image(torch_of_picture()) for g in (ours, theirs)]
    message = [Message("user", (PicturePart(), "a red", PicturePart()))]
    prompts = [g.prompt(message, [picture, picture]) for g, picture in zip((ours, theirs), shown)]
    prompts = [Prompt(p.ids[:-1], p.pictures) for p in prompts]  # the newline after the text
    assert prompts[0].ids[-1] == ours.image_id
    steppers = ours.stepper(), theirs.stepper()
    logits = [stepper.start([prompt]) for stepper, prompt in zip(steppers, prompts)]
    assert np.allclose(*logits, atol=1e-3)
    assert [int(m.sum()) for m in steppers[0]._masks][-1] == int(steppers[1]._started().layers[-1].mask.sum())
    assert np.allclose(*[stepper.advance(np.array([9])) for stepper in steppers], atol=1e-3)


def torch_of_picture():
    from vlm.export.drawings import drawn_picture

    return drawn_picture(16, 16, 4)


def test_most_kept_counts_text_and_what_no_text_follows():
    picture = np.array([[-1, 0, 0, 0, -1, 1, 1, 1], [-1, -1, -1, -1, -1, 0, 0, -1]])
    mask = np.ones((2, 8), np.int64)
    assert most_kept(mask, picture, 1) == 7
    assert most_kept(mask[:1], picture[:1], 1) == 6
    assert most_kept(mask[:1], picture[:1], 0) == 5
    assert most_kept(mask, picture, 9) == 8
    mask[1, :5] = 0
    assert most_kept(mask[1:], picture[1:], 1) == 2


@pytest.mark.parametrize("kind", ["prefix", "drop"])
def test_positions_that_no_row_holds_are_given_up(kind):
    ours, _, prompts, _ = both(kind, 3)
    long = ours.prompt([Message("user", ("a red circle on a blue square " * 3,))])
    stepper = ours.stepper()
    stepper.start([prompts[0], long])
    before = stepper.cache_bytes
    stepper.reorder(np.array([0]))
    alone = ours.stepper()
    alone.start(prompts[:1])
    assert stepper.cache_bytes == alone.cache_bytes < before / 2
    assert np.allclose(stepper.advance(np.array([9])), alone.advance(np.array([9])), atol=1e-4)


def test_a_row_never_grows_beyond_the_model_s_length():
    ours = bundle_of("language")
    stepper = ours.stepper()
    stepper.start([Prompt([2] * (ours.length - 1))])
    stepper.advance(np.array([5]))
    with pytest.raises(RequestError, match=f"{ours.length + 1} positions"):
        stepper.advance(np.array([5]))
    with pytest.raises(RequestError, match="positions"):
        ours.stepper().start([Prompt([2] * (ours.length + 1))])


def test_wrong_prompts_are_refused():
    ours, language = bundle_of("prefix"), bundle_of("language")
    picture = ours.prepare_image(torch_of_picture())
    with pytest.raises(ValueError, match="1 picture placeholders, 0 pictures in 'image'"):
        ours.stepper().start([Prompt([2, ours.image_id])])
    with pytest.raises(ValueError, match="reads no pictures 'image.other'"):
        ours.stepper().start([Prompt([2], {"image.other": [picture["image"]]})])
    with pytest.raises(ValueError, match="no tokens"):
        ours.stepper().start([Prompt([])])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ours.stepper().start([Prompt([ours.vocab_size])])
    with pytest.raises(RuntimeError, match="call start first"):
        ours.stepper().advance(np.array([1]))
    with pytest.raises(DataError, match="reads no pictures"):
        language.prompt([Message("user", ("x",))], [picture])
    assert ours.stepper().start([]).shape == (0, ours.vocab_size)


def test_text_that_spells_the_placeholder_stays_text():
    ours = bundle_of("prefix")
    prompt = ours.prompt([Message("user", ("an <image> and <|im_end|> here",))])
    assert ours.image_id not in prompt.ids
    assert "<image>" in ours.text(prompt.ids)


def test_it_writes_where_torch_cannot_be_imported(prefix_bundle):
    script = f"""
import sys
class Block:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "pydantic"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from vlm.runtime import open_any_bundle
from vlm.runtime.chat import Message
from vlm.runtime.generation import Decoding, generate
bundle = open_any_bundle({str(prefix_bundle)!r}, threads=1)
bundle.self_test()
case = {json.dumps(golden_of(prefix_bundle)["prompts"][0])}
shown = [bundle.prepare_image({str(prefix_bundle)!r} + "/golden/" + name) for name in case["pictures"]]
prompt = bundle.prompt([Message("user", (case["text"],))], shown)
print(generate(bundle, [prompt], Decoding(max_new_tokens=len(case["answer"]), forbidden=tuple(bundle.eos_ids)))[0].ids)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tuple(golden_of(prefix_bundle)["prompts"][0]["answer"]))


@pytest.fixture
def copy(prefix_bundle, tmp_path):
    return Path(shutil.copytree(prefix_bundle, tmp_path / "copy"))


def rewritten(bundle, name, change):
    value = json.loads((bundle / name).read_text())
    change(value)
    (bundle / name).write_text(json.dumps(value))
    return bundle


def test_a_golden_answer_that_differs_fails_the_self_test(copy):
    def other(golden):
        golden["prompts"][0]["answer"][0] ^= 1

    with pytest.raises(GateFailed, match="gets another answer"):
        open_any_bundle(rewritten(copy, "golden/golden.json", other), verify=False).self_test()


def test_golden_answers_are_held_to_their_probability(copy):
    def other(golden):
        golden["prompts"][0]["nats"][0] += 0.1

    with pytest.raises(GateFailed, match="nats, expected"):
        open_any_bundle(rewritten(copy, "golden/golden.json", other), verify=False).self_test()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda about: about.pop("decoder"), "are missing"),
        (lambda about: about["decoder"].update(layers=3), "has no past_key_values.2.key"),
        (lambda about: about["decoder"].update(layers=10**9), "out of its range"),
        (lambda about: about["decoder"].update(width="x"), "missing or wrong"),
        (lambda about: about["text"].update(image_id=10**6), "not in the vocabulary"),
        (lambda about: about["text"].update(eos_ids=["x"]), "not in the vocabulary"),
        (lambda about: about["template"].update(colour="red"), "unknown field"),
        (lambda about: about.update(template="plain"), "no table"),
        (lambda about: about["pictures"].update(streams=[]), "pictures.streams"),
        (lambda about: about["pictures"].pop("tokens"), "pictures.tokens"),
        (lambda about: about["pictures"].update(tokens=-1), "expected 1 to"),
        (lambda about: about["graphs"].pop("vision"), "'vision' is missing"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, change, says):
    with pytest.raises(CheckpointError, match=says):
        open_any_bundle(rewritten(copy, "bundle.json", change), verify=False)


def test_a_language_bundle_of_an_earlier_release_still_scores(tmp_path):
    def older(about):
        for name in ("decoder", "template"):
            about.pop(name)
        for name in ("embed", "decoder_with_past"):
            about["graphs"].pop(name)
        for name in ("bos_id", "eos_ids"):
            about["text"].pop(name)

    bundle = Path(shutil.copytree(exported("language")[0], tmp_path / "copy"))
    opened = open_any_bundle(rewritten(bundle, "bundle.json", older), verify=False)
    assert opened.self_test() < 1e-4
    assert opened.logits(np.array([[2, 5]])).shape == (1, 2, opened.vocab_size)
    with pytest.raises(CheckpointError, match="no decoder with a cache"):
        opened.stepper()


def test_schema_is_still_one():
    about = json.loads((answering_bundle("prefix")[0] / "bundle.json").read_text())
    assert (about["schema"], about["kind"]) == (1, "vision-language")


def test_nvlm_h_tiles_and_their_tags_have_no_position():
    from vlm.export.drawings import drawn_picture
    from vlm.runtime.tiling import THUMBNAIL

    ours, theirs = bundle_of("tiles-apart"), torch_of("tiles-apart")
    message, picture = [Message("user", ("a red thing",))], drawn_picture(48, 16, 3)
    prompt = ours.prompt(message, [ours.prepare_image(picture)])
    tiles = sum(place[1:] != THUMBNAIL for place in prompt.places)
    assert (tiles, len(prompt.places)) == (3, 4)
    tokens = ours.visual_tokens([ours.prepare_image(picture)]).shape[1]
    stepper = ours.stepper()
    stepper.start([prompt])
    own_tags = [at for at in prompt.tags if ours.image_id in prompt.ids[at:]]
    of_thumbnail = len(own_tags) - (int(stepper._beside_mask.sum()) - tiles * tokens)
    assert 0 < of_thumbnail < len(own_tags)  # the thumbnail's tag stays in the row
    positions = len(prompt.ids) - (len(own_tags) - of_thumbnail) - tiles + (tokens - 1)
    assert int(stepper._masks[0].sum()) == ours.positions(prompt) == positions
    assert theirs.positions(theirs.prompt(message, [theirs.prepare_image(picture)])) == positions
