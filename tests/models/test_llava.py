"""LLaVA directories are the same functions here and in transformers, in both directions."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.models.model_makers import batch_of, logits_of, pictures_of, rows_of
from vlm.config.errors import CheckpointError
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.generator import TorchGenerator
from vlm.models import LanguageOptions, VisionLanguageOptions, load_model, save_model
from vlm.models.layouts import LLAVA
from vlm.runtime.generation import Prompt
from vlm.runtime.templates import TEMPLATES
from vlm.types import VocabularyLayout

IMAGE = 98
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8)
TEXT = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=99, bos_token_id=1, eos_token_id=3, pad_token_id=0)
KINDS = [("clip", "llama"), ("clip", "qwen2"), ("siglip", "llama"), ("siglip", "qwen2")]


def published(vision="clip", text="llama", *, layer=-2, strategy=None, tie=False, image_size=16):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[vision](**VISION | {"image_size": image_size}),
        text_config={"llama": LlamaConfig, "qwen2": Qwen2Config}[text](**TEXT, tie_word_embeddings=tie),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy or {"clip": "default", "siglip": "full"}[vision],
        tie_word_embeddings=tie,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def spread(rows, count):
    """Their form of the rows: a placeholder for every visual position, padded on the left."""
    lists = [[token for one in row for token in ([one] * count if one == IMAGE else [one])] for row in rows]
    size = max(map(len, lists))
    ids, mask = torch.zeros(len(lists), size, dtype=torch.int64), torch.zeros(len(lists), size, dtype=torch.int64)
    for row, values in enumerate(lists):
        ids[row, size - len(values) :], mask[row, size - len(values) :] = torch.tensor(values), 1
    return ids, mask


ROWS = [[1, 5, IMAGE, 6, 7, 8], [1, 9, 10], [1, IMAGE, 11, IMAGE, 12]]
COUNTS = [1, 0, 2]


@pytest.mark.parametrize(("vision", "text"), KINDS)
@pytest.mark.parametrize(("layer", "size"), [(-2, 16), (-1, 16), (1, 16), (-2, 23)])  # 23: pixels that fill no patch
def test_a_published_llava_gives_the_same_logits(vision, text, layer, size, tmp_path):
    theirs = published(vision, text, layer=layer, image_size=size)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    pictures = pictures_of(COUNTS, size=size)
    ids, mask = spread(ROWS, 4)
    with torch.no_grad():
        logits, layout = logits_of(ours, batch_of(3, text=rows_of(ROWS), image=pictures))
        pixels = ours.pixel_norms["main"](pictures.values)
        expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    for row in range(3):
        assert torch.allclose(logits[row, layout.mask[row]], expected[row, mask[row].bool()], atol=2e-5)


@pytest.mark.parametrize(("vision", "text"), KINDS)
def test_greedy_tokens_on_a_picture_and_a_text_are_those_of_transformers(vision, text, tmp_path):
    theirs = published(vision, text)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokenizer = Tokenizer.train_bpe(["a"], 300)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (3, 16, 16), dtype=np.uint8) for _ in range(3)]
    taken = iter(pictures)
    prompts = [Prompt(row, {"image": [next(taken) for _ in range(count)]}) for row, count in zip(ROWS, COUNTS)]
    stepper = TorchGenerator(ours, tokenizer, TEMPLATES["plain"]).stepper()
    logits, got = stepper.start(prompts), []
    for _ in range(12):
        got.append(logits.argmax(-1))
        logits = stepper.advance(got[-1])
    ids, mask = spread(ROWS, 4)
    pixels = ours.pixel_norms["main"](torch.from_numpy(np.stack(pictures)))
    with torch.no_grad():
        out = theirs.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=12, do_sample=False,
                              eos_token_id=[], pad_token_id=0)
    assert np.stack(got, 1).tolist() == out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("vision", "text"), KINDS)
@pytest.mark.parametrize("tie", [False, True])
def test_a_saved_llava_is_the_published_one_again(vision, text, tie, tmp_path):
    theirs = published(vision, text, tie=tie)
    theirs.save_pretrained(tmp_path / "published")
    ours = load_model(tmp_path / "published")
    assert LLAVA.expresses(ours.options)
    save_model(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    left_out = set(theirs.state_dict()) - set(again.state_dict())
    assert all(".head." in name and "vision_tower" in name for name in left_out)
    reloaded = load_model(tmp_path / "ours")
    assert all(torch.equal(t, reloaded.state_dict()[name]) for name, t in ours.state_dict().items())
    assert reloaded.options == ours.options


def test_names_of_earlier_and_of_inner_forms_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    published().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, ours = load_file(file), load_model(tmp_path).state_dict()
    inner = {}
    for name, tensor in tensors.items():
        name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
        name = f"model.{name}" if name.startswith(("vision_tower", "multi_modal")) else name
        inner[name] = tensor.clone()
    save_file(inner, file)
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())


def test_what_the_layout_cannot_say_is_refused_or_saved_in_our_own(tmp_path):
    published("siglip", strategy="default").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="would drop the first patch"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"vision_feature_layer": [-2, -1]}, "expected one layer"),
        ({"vision_feature_layer": True}, "expected one layer"),
        ({"vision_feature_layer": None}, "expected one layer"),
        ({"vision_feature_select_strategy": "other"}, "expected default or full"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config.model_type 'gpt2' is not supported"),
        ({"vision_feature_select_strategy": "full", "vision_config": {"model_type": "dinov2"}}, "'dinov2' is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    published().save_pretrained(tmp_path / "good")
    table = load_model(tmp_path / "good").options.model_dump()
    for change in (
        {"connector": {"kind": "linear"}},
        {"connector": {**table["connector"], "depth": 3}},
        {"fusion": {"kind": "cross-attention", "every": 1}},
        {"tokens": {"keep": {"kind": "stages", "layers": [1], "ratios": [0.5]}}},
        {"towers": {"main": table["towers"]["main"] | {"norm": True}}},
        {"language": table["language"] | {"norm": "layernorm"}},
    ):
        options = VisionLanguageOptions.model_validate(table | change)
        assert not LLAVA.expresses(options)
        model = options.build(VocabularyLayout.of_text(99, {"image": IMAGE}))
        save_model(model, tmp_path / "own")
        again = load_model(tmp_path / "own")
        assert again.options == model.options
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_the_published_defaults_of_a_sparse_config_are_llavas():
    """Hub configs leave out what equals the class's default."""
    sparse = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
                          "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16},
    }
    options, theirs = LLAVA.from_config(sparse), LlavaConfig(**{k: v for k, v in sparse.items() if k != "model_type"})
    language, tower, text = options.language, options.towers["main"], theirs.text_config
    assert isinstance(language, LanguageOptions)
    assert (language.width, language.depth, language.heads, language.ffn_width, language.vocab_size) == (
        text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size, text.vocab_size)
    assert (tower.layer, tower.drop_class, tower.norm, tower.tokens, options.template) == (-2, True, False, 576, "vicuna")
    assert tower.activation == "quick_gelu"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_of_published_dual_encoders_are_parts(kind, tmp_path):
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    words = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99,
                 max_position_embeddings=12, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    if kind == "clip":
        theirs = CLIPModel(CLIPConfig(text_config=words, vision_config=VISION, projection_dim=24)).eval()
    else:
        theirs = SiglipModel(SiglipConfig(text_config=words | {"projection_size": 32}, vision_config=VISION)).eval()
    theirs.save_pretrained(tmp_path)
    source = load_model(tmp_path)
    table = {"towers": {"main": {"layer": -2, "norm": False}}, "connector": {"kind": "mlp"}, "length": 32,
             "language": {"width": 24, "depth": 2, "heads": 4, "ffn_width": 48, "length": 32}}
    options = VisionLanguageOptions.model_validate(table).with_parts({"towers.main": source})
    model = options.build(VocabularyLayout.of_text(99, {"image": IMAGE})).eval()
    model.take_part("towers.main", source)
    assert LLAVA.expresses(model.options)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        hidden = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        features = hidden[:, 1:] if kind == "clip" else hidden
        assert torch.allclose(model.visual_tokens({"main": pixels})[0], model.connector(features, None)[0], atol=1e-6)
    assert model.preprocess() == source.preprocess()


TEMPLATE = (
    "{%- for m in messages -%}{{ m.role }}: {% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}\n{%- endfor -%}"
)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_processor_of_a_saved_directory_prepares_what_we_prepare(vision, tmp_path):
    tokenizer = Tokenizer.train_bpe(["what is in the picture"], 300, ["<image>"])
    image = tokenizer.token_to_id("<image>")
    published(vision).save_pretrained(tmp_path / "published")
    options = load_model(tmp_path / "published").options
    language = options.language.model_copy(update={"vocab_size": tokenizer.vocab_size})
    ours = options.model_copy(update={"language": language}).build(VocabularyLayout.of_text(tokenizer.vocab_size, {"image": image})).eval()
    save_model(ours, tmp_path / "ours", template=TEMPLATE)
    tokenizer.save(tmp_path / "ours")
    (tmp_path / "ours" / "preprocessor_config.json").write_text(json.dumps(ours.preprocess().to_config()))
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is"}]}])
    assert text == "user: <image>what is"
    given = processor(images=picture, text=text, return_tensors="pt")
    ids = given["input_ids"][0].tolist()
    assert ids.count(image) == 4 == ours.picture_positions
    own = torch.from_numpy(ours.preprocess().to_array(picture))[None]
    assert torch.allclose(given["pixel_values"], ours.pixel_norms["main"](own), atol=1e-5)
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()(**given).logits
        single = [token for place, token in enumerate(ids) if token != image or ids[place - 1] != image]
        stream = pictures_of([1])
        logits, _ = logits_of(ours, batch_of(1, text=rows_of([single]), image=type(stream)(own, stream.mask, stream.sample_index)))
    assert torch.allclose(logits, expected, atol=2e-5)
