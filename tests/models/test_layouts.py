"""Our models and the published ones are the same functions, in both directions and bit for bit on disk."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from vlm.config.errors import CheckpointError
from vlm.models import load_model, save_model
from vlm.types import Batch, Pictures, TokenIds

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
            max_position_embeddings=12, bos_token_id=1, eos_token_id=3, pad_token_id=0)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)


def published(kind, **vision):
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=TEXT | {"projection_dim": 24}, vision_config=VISION | {"projection_dim": 24} | vision,
                                     projection_dim=24))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION | vision))
    else:
        shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     vocab_size=99, bos_token_id=1, eos_token_id=3, pad_token_id=0)
        model = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[kind](
            {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**shape)
        )
    with torch.no_grad():  # published initialisations leave many tensors at zero, which would hide a wrong name
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tokens(rows=3, length=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 99, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row, stop in enumerate([5, 12, 8][:rows]):
        ids[row, stop - 1], ids[row, stop:], mask[row, stop:] = 3, 0, False
    return ids, mask


def batch_of(pixels, ids, mask):
    n = ids.shape[0]
    index = torch.arange(n)
    streams = {"text": TokenIds(ids, mask, index)}
    if pixels is not None:
        streams["image"] = Pictures(pixels, torch.ones(n, dtype=torch.bool), index)
    return Batch(streams, [str(i) for i in range(n)], index, index * 0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", [16, 22])  # 22 pixels in patches of 8: two a side, as 384 in patches of 14 are 27
def test_a_published_dual_encoder_loads_and_embeds_alike(kind, size, tmp_path):
    theirs = published(kind, image_size=size)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    ids, mask = tokens()
    pixels = torch.rand(3, 3, size, size)
    with torch.no_grad():
        out = ours.encode(batch_of(pixels, ids, mask), {"image": frozenset({"embedding"}), "text": frozenset({"embedding"})})
        x = ours.pixel_norm(pixels)
        # SigLIP attends padding, so its reference is called without a mask, as published pipelines do.
        expected = theirs(input_ids=ids, pixel_values=x, attention_mask=mask.long() if kind == "clip" else None)
    unit = torch.nn.functional.normalize
    assert torch.allclose(unit(out["image"].embedding, dim=-1), expected.image_embeds, atol=2e-6)
    assert torch.allclose(unit(out["text"].embedding, dim=-1), expected.text_embeds, atol=2e-6)


@pytest.mark.parametrize(("kind", "vision"), [("clip", {}), ("siglip", {}), ("siglip", {"image_size": 22}), ("llama", {}), ("qwen2", {})])
def test_a_saved_model_is_the_published_one_again(kind, vision, tmp_path):
    theirs = published(kind, **vision)
    theirs.save_pretrained(tmp_path / "published")
    ours = load_model(tmp_path / "published")
    save_model(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    reloaded = load_model(tmp_path / "ours")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_published_language_model_gives_the_same_logits_padded_or_not(kind, tmp_path):
    theirs = published(kind)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    ids, mask = tokens()
    with torch.no_grad():
        out = ours.encode(batch_of(None, ids, mask), {"text": frozenset({"vocabulary"})})["text"]
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits
    assert torch.allclose(out.vocabulary.logits()[mask], expected[mask], atol=1e-5)
    assert not torch.isclose(out.vocabulary.logits()[mask].std(), torch.tensor(0.0), atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_rows_without_padding_give_the_very_same_logits(kind, tmp_path):
    theirs = published(kind)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    ids = torch.randint(4, 99, (3, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out = ours.encode(batch_of(None, ids, ids > 0), {"text": frozenset({"vocabulary"})})["text"]
        assert torch.equal(out.vocabulary.logits(), theirs(input_ids=ids).logits)


def test_a_qwen2_that_attends_in_windows_is_refused(tmp_path):
    published("qwen2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_sliding_window": True}))
    with pytest.raises(CheckpointError, match="use_sliding_window = true is not supported"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
    ids=["beside the new table", "under its older name", "old name in the new table"],
)
def test_rotary_scaling_is_refused_wherever_the_config_says_it(kind, change, tmp_path):
    """transformers scales in each of these forms; read as unscaled they gave other logits without a word."""
    published(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "default"
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=r"rotary scaling '(linear|yarn)' is not supported"):
        load_model(tmp_path)


def test_packed_documents_do_not_see_one_another(tmp_path):
    published("llama").save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    ids = torch.randint(4, 99, (1, 11), generator=torch.Generator().manual_seed(2))
    segment = torch.tensor([[0] * 5 + [1] * 6])
    full = torch.ones(1, 11, dtype=torch.bool)
    packed = TokenIds(ids, full, torch.zeros(1, dtype=torch.int64), segment=segment)
    batch = Batch({"text": packed}, ["a"], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        together = ours.encode(batch, {"text": frozenset({"vocabulary"})})["text"].vocabulary.logits()
        for part in (slice(0, 5), slice(5, 11)):
            alone = ours.encode(batch_of(None, ids[:, part], full[:, part]), {"text": frozenset({"vocabulary"})})["text"]
            assert torch.allclose(together[:, part], alone.vocabulary.logits(), atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_config_whose_settings_make_no_model_is_named(kind, tmp_path):
    published(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["image_size"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json: makes no model: image_size 7 is no multiple of patch_size 8"):
        load_model(tmp_path)


def test_pickle_is_refused_by_name(tmp_path):
    model = published("clip")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*refused"):
        load_model(tmp_path)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    published("clip").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 13
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'text.position' is \(12, 32\), expected \(13, 32\)"):
        load_model(tmp_path)


def test_a_text_tower_with_our_tokenizer_pools_at_eos_as_transformers_does(tmp_path):
    """eos id 2 would mean "the greatest id" to transformers, so our tokenizers never give it."""
    from vlm.data.tokenizer import Tokenizer
    from vlm.models import DualEncoderOptions
    from vlm.training.run import vocabulary_of

    tokenizer = Tokenizer.train_bpe(["a red circle", "a blue square on the left"] * 5, 300)
    assert tokenizer.eos_id not in (None, 2)
    torch.manual_seed(0)
    ours = DualEncoderOptions.model_validate(
        {"embed_dim": 8, "vision": VISION_TINY, "text": {"width": 16, "depth": 1, "heads": 2, "length": 12}}
    ).build(vocabulary_of(tokenizer))
    save_model(ours, tmp_path)
    encoded = tokenizer.encode(["a red circle", "a blue square on the left"], 12)
    ids, mask = (torch.as_tensor(part) for part in encoded)
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        x = ours.text(ids, mask.bool())
        at = (ids == tokenizer.eos_id).int().argmax(1)
        assert torch.equal(x[1], x[0][torch.arange(2), at])
        expected = theirs.get_text_features(input_ids=ids, attention_mask=mask.long())
        expected = getattr(expected, "pooler_output", expected)
        assert torch.allclose(ours.text.embed(ids, mask.bool()), expected, atol=1e-6)


VISION_TINY = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(kind, tmp_path):
    published(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert load_model(tmp_path).head is not None
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"head\.weight.*differs from the embedding"):
        load_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(tmp_path).head is None


def test_the_towers_of_the_first_published_configs_are_read(tmp_path):
    theirs = published("clip")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    towers = {f"{part}_config_dict": config[f"{part}_config"] for part in ("text", "vision")}
    rest = {name: value for name, value in config.items() if name not in ("text_config", "vision_config")}
    for given in (rest | towers, rest | towers | {"text_config": {"hidden_size": 512}, "vision_config": None}):
        (tmp_path / "config.json").write_text(json.dumps(given))
        ours = load_model(tmp_path)
        assert ours.options.text.width == 32
        assert ours.options.vision.image_size == 16
        assert torch.equal(ours.text.tokens.weight, theirs.text_model.embeddings.token_embedding.weight)


@pytest.mark.parametrize("named", [None, [], {}, {"a": None}, {"a": ["x"]}, {"a": ""}, {"a": "../x.safetensors"}, {"a": "missing.safetensors"}])
def test_an_index_of_shards_that_names_none_is_refused(named, tmp_path):
    published("clip").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(CheckpointError, match=r"index\.json|missing\.safetensors"):
        load_model(tmp_path)
