"""Torch models behind the decoding loop: steppers equal recomputation and transformers' own generation."""


import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.models.model_makers import answering, language
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.generator import TorchGenerator, pictures_of
from vlm.models import load_model
from vlm.runtime.chat import Template
from vlm.runtime.generation import Prompt

IMAGE = 3
PREFIX, CROSS = {"kind": "prefix"}, {"kind": "cross-attention", "every": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["a red circle", "what is in the picture?"] * 3, 300, ["<image>"])


def asked(ids, pictures=None):
    return Prompt(ids, pictures or {})


def pictures(count, seed=0, size=16):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (3, size, size), dtype=np.uint8) for _ in range(count)]


def generator_of(model, tokenizer):
    return TorchGenerator(model, tokenizer, Template("bare"), batch=2)


def greedy(stepper, prompts, steps):
    logits, rows = stepper.start(prompts), []
    for _ in range(steps):
        ids = logits.argmax(-1)
        rows.append(ids)
        logits = stepper.advance(ids)
    return np.stack(rows, 1).tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_tokens_are_those_of_transformers(kind, tmp_path, tokenizer):
    torch.manual_seed(3)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=99, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    config, family = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    theirs = family(config(**shape)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16]]
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):  # they pad on the left
        ids[row, 7 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 7 - len(prompt) :] = 1
    with torch.no_grad():
        expected = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=[], pad_token_id=0)
    stepper = generator_of(load_model(tmp_path), tokenizer).stepper()
    got = greedy(stepper, [asked(prompt) for prompt in prompts], 20)
    assert got == expected[:, 7:].tolist()
    assert len({token for row in got for token in row}) > 5
    assert stepper.vocab_size == 99


@pytest.mark.parametrize("fusion", [PREFIX, CROSS], ids=["prefix", "cross"])
def test_a_stepper_equals_starting_again(fusion, tokenizer):
    model = answering(fusion, shake=0.3)
    prompts = [
        asked([2, 5, IMAGE, 6], {"image": pictures(1)}),
        asked([2, 7]),
        asked([IMAGE, 8, IMAGE, 9, 10], {"image": pictures(2, seed=1)}),
    ]
    stepper = generator_of(model, tokenizer).stepper()
    logits = stepper.start(prompts)
    assert logits.dtype == np.float32
    assert logits.shape == (3, 61)
    stepper.reorder(np.array([2, 0, 0, 1]))
    rows = [prompts[2], prompts[0], prompts[0], prompts[1]]
    written = np.array([[20, 21, 22, 23], [24, 25, 26, 27]])
    for step in (1, 2):
        logits = stepper.advance(written[step - 1])
        longer = [asked([*row.ids, *written[:step, number].tolist()], row.pictures) for number, row in enumerate(rows)]
        again = generator_of(model, tokenizer).stepper().start(longer)
        np.testing.assert_allclose(logits, again, atol=1e-5)
    assert stepper.cache_bytes > 0
    stepper.reorder(np.array([3]))
    alone = generator_of(model, tokenizer).stepper().start([asked([2, 7, 23, 27, 30])])
    np.testing.assert_allclose(stepper.advance(np.array([30])), alone, atol=1e-5)


def test_a_stepper_needs_a_start_and_pictures_for_its_placeholders(tokenizer):
    stepper = generator_of(answering(), tokenizer).stepper()
    with pytest.raises(RuntimeError, match="call start first"):
        stepper.advance(np.array([1]))
    with pytest.raises(ValueError, match="'prompt 1': 1 picture placeholders"):
        stepper.start([asked([2]), asked([2, IMAGE])])
    with pytest.raises(ValueError, match="no prompt"):
        stepper.start([])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        stepper.start([asked([2]), asked([])])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generator_of(language(), tokenizer).nats([asked([])], [[4, 5]])
    with pytest.raises(ValueError, match="reads no pictures"):
        generator_of(language(), tokenizer).stepper().start([asked([2], {"image": pictures(1)})])


def test_the_models_mode_and_gradients_are_left_alone(tokenizer):
    model = answering().train()
    stepper = generator_of(model, tokenizer).stepper()
    stepper.start([asked([2, 5])])
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("tokens", [None, {"keep": {"layers": [1, 2], "ratios": [0.5, 0.25]}}], ids=["all", "dropping"])
def test_nats_are_those_of_the_steps(tokens, tokenizer):
    model = answering(tokens=tokens, shake=0.3)
    generator = generator_of(model, tokenizer)
    prompts = [
        asked([2, IMAGE, 5, 6], {"image": pictures(1)}),
        asked([2, 7]),
        asked([IMAGE, 8, IMAGE, 9], {"image": pictures(2, seed=1)}),
        asked([2, 9]),
        asked([2, IMAGE, 11], {"image": pictures(1, seed=2)}),
    ]
    answers = [[20, 21, 1], [22], [], [23, 24], [25, 26, 27, 1]]
    nats = generator.nats(prompts, answers)
    assert [len(row) for row in nats] == [3, 1, 0, 2, 4]
    for prompt, answer, row in zip(prompts, answers, nats):
        stepper = generator.stepper()
        logits, expected = stepper.start([prompt])[0], []
        for token in answer:
            wide = torch.from_numpy(logits).double()
            expected.append(float(wide.logsumexp(0) - wide[token]))
            logits = stepper.advance(np.array([token]))[0]
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert generator.nats([], []) == []


def test_positions_count_expanded_pictures(tokenizer):
    prompt = asked([2, IMAGE, 5, IMAGE], {"image": pictures(2)})
    assert generator_of(answering(PREFIX), tokenizer).positions(prompt) == 2 + 2 * 4
    assert generator_of(answering(CROSS), tokenizer).positions(prompt) == 4
    assert generator_of(language(), tokenizer).positions(asked([2, 5])) == 2


def test_pictures_are_prepared_for_each_stream_and_kept_in_order(tokenizer):
    from PIL import Image

    towers = {name: dict(width=12, depth=2, heads=2, image_size=size, patch_size=size // 2)
              for name, size in (("main", 16), ("fine", 32))}
    generator = generator_of(answering(towers=towers), tokenizer)
    prepared = generator.prepare_image(Image.new("L", (40, 20), 200))
    assert {name: (p.shape, p.dtype) for name, p in prepared.items()} == {
        "image": ((3, 16, 16), np.uint8), "image.fine": ((3, 32, 32), np.uint8)
    }
    first, second = pictures(2)
    streams = pictures_of([asked([], {"image": [first]}), asked([]), asked([], {"image": [second, first]})])
    stream = streams["image"]
    assert stream.sample_index.tolist() == [0, 2, 2]
    assert stream.slot.tolist() == [0, 0, 1]
    assert np.array_equal(stream.values[1].numpy(), second)
    assert generator.length == 64


def test_answers_end_at_eos_and_at_the_templates_own_end(tokenizer):
    model = answering()
    generator = TorchGenerator(model, tokenizer, Template("plain"))
    assert generator.eos_ids == {tokenizer.eos_id}
    generator.use_template(Template("own", end="<pad>"))
    assert generator.eos_ids == {tokenizer.eos_id, tokenizer.pad_id}
    generator.use_template(Template("plain"))
    assert generator.eos_ids == {tokenizer.eos_id}


def test_a_picture_with_alpha_is_laid_over_white_like_any_other(tokenizer):
    import io

    from PIL import Image

    from vlm.runtime.pictures import decode_picture

    generator = generator_of(answering(), tokenizer)
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    picture.putpixel((3, 3), (0, 255, 0, 0))
    data = io.BytesIO()
    picture.save(data, "PNG")
    wanted = next(iter(generator.model.preprocesses().values())).to_array(decode_picture(data.getvalue()))
    for given in (picture, data.getvalue()):
        assert np.array_equal(generator.prepare_image(given)["image"], wanted)


def test_texts_of_a_generator(tokenizer):
    model = answering()
    text = generator_of(model, tokenizer).text(tokenizer.ids(["a red circle"])[0])
    assert text == "a red circle"


@pytest.fixture
def opened(tokenizer):
    """A generator with a real template."""
    from vlm.evaluation.generator import open_generator
    from vlm.models import VisionLanguageOptions
    from vlm.types import VocabularyLayout

    def made(**changes):
        vocabulary = VocabularyLayout.of_text(tokenizer.vocab_size, {"image": tokenizer.token_to_id("<image>")})
        table = answering(**changes).options.model_dump()
        model = VisionLanguageOptions.model_validate(table).build(vocabulary).eval()
        return open_generator(model, tokenizer)

    return made


def asking(generator, count=2):
    from vlm.runtime.chat import Message

    prepared = [{"image": picture} for picture in pictures(count)]
    return generator.prompt([Message("user", ("what is in <image> the picture?",))], prepared)


def test_a_prompt_is_what_the_template_writes(opened, tokenizer):
    generator, image = opened(), tokenizer.token_to_id("<image>")
    prompt = asking(generator)
    ids = list(prompt.ids)
    assert ids[0] == tokenizer.bos_id
    assert ids[1:3] == [image, image]
    assert image not in ids[3:]
    assert tokenizer.decode(ids) == "what is in <image> the picture?\n"
    assert len(prompt.pictures["image"]) == 2
    assert generator.positions(prompt) == len(ids) + 2 * 3
    assert generator.stepper().start([prompt]).shape == (1, tokenizer.vocab_size)


def test_it_is_what_the_decoding_loop_takes(opened):
    from vlm.runtime.generation import Decoding, Generator, Stepper, generate

    generator = opened()
    assert isinstance(generator, Generator)
    assert isinstance(generator.stepper(), Stepper)
    prompts = [asking(generator), asking(generator, 1)]
    together = generate(generator, prompts, Decoding(max_new_tokens=6))
    for prompt, completion in zip(prompts, together):
        (alone,) = generate(generator, [prompt], Decoding(max_new_tokens=6))
        assert list(alone.ids) == list(completion.ids)
    assert generator.negatives.image_id == generator.image_id
    assert opened(fusion=CROSS).positions(prompts[0]) == len(prompts[0].ids)


def test_the_nats_of_a_text_are_those_of_its_ids(opened, tokenizer):
    generator = opened()
    prompt = asking(generator)
    ids = generator.answer_ids("a red circle")
    assert ids == [*tokenizer.ids(["a red circle"], add_special=False)[0], tokenizer.eos_id]
    one, other = generator.nats([prompt, prompt], ["a red circle", ids])
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_shapes_and_kept_positions(opened):
    generator = opened(tokens={"keep": {"layers": [1, 3], "ratios": [0.5, 0.25]}})
    shape, prompt = generator.shape(), asking(generator)
    text = len(prompt.ids) - 2
    assert generator.kept(prompt) == [text + 8, text + 4, text + 4, text + 2]
    assert sum(shape.parameters.values()) == sum(p.numel() for p in generator.model.parameters())
    assert set(shape.parameters) == {"towers", "connector", "language"}
    assert shape.visual_tokens == {"image": 4}
    assert (shape.towers["image"].positions, shape.towers["image"].connector, shape.decoder.depth) == (5, 12 * 16, 4)
    stepper = generator.stepper()
    stepper.start([prompt])
    assert stepper.cache_bytes == 2 * 2 * 4 * sum(generator.kept(prompt)) * 4
