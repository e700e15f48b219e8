"""Towers, connector and language model: what of a tower is read, and parts that come from other models."""

import pytest
import torch

from tests.models.model_makers import (
    TOWER,
    VOCABULARY,
    answering,
    batch_of,
    language,
    logits_of,
    pictures_of,
    rows_of,
    shaken,
)
from tests.models.picture_rows import IMAGE, PREFIX, built
from vlm.config.errors import CheckpointError, RequestError
from vlm.models import DualEncoderOptions, VisionLanguageOptions
from vlm.types import VocabularyLayout


def dual_encoder():
    torch.manual_seed(5)
    table = {
        "embed_dim": 6,
        "vision": {"width": 12, "depth": 3, "heads": 2, "image_size": 16, "patch_size": 8, "pool": "attention"},
        "text": {"width": 8, "depth": 1, "heads": 2, "length": 8},
        "pictures": {"resize": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    }
    return shaken(DualEncoderOptions.model_validate(table).build(VOCABULARY))


def open_options(**changes):
    table = dict(towers={"main": {"layer": -2}}, connector={"kind": "linear"}, length=32)
    return VisionLanguageOptions.model_validate(table | changes)


@torch.no_grad()
def test_two_towers_are_laid_side_by_side():
    towers = {"main": TOWER, "fine": dict(TOWER, width=8, image_size=32, patch_size=16, class_token=False)}
    model = built(PREFIX, towers=towers)
    assert {name: p.size for name, p in model.preprocesses().items()} == {"image": 16, "image.fine": 32}
    assert next(model.connector.parameters()).shape == (16, 20)
    assert model.picture_positions == 4
    small, large = pictures_of([1, 1]), pictures_of([1, 1], seed=4, size=32)
    text = rows_of([[2, IMAGE, 5], [IMAGE, 6]])
    logits, _ = logits_of(model, batch_of(2, text=text, image=small, image__fine=large))
    other, _ = logits_of(model, batch_of(2, text=text, image=small, image__fine=pictures_of([1, 1], seed=5, size=32)))
    assert not torch.allclose(logits, other, atol=1e-4)
    with pytest.raises(KeyError, match="tower 'fine' are missing"):
        logits_of(model, batch_of(2, text=text, image=small))
    with pytest.raises(ValueError, match="do not lie on one grid: main 2 x 2"):
        built(PREFIX, towers={"main": TOWER, "fine": dict(TOWER, image_size=32)})


@torch.no_grad()
def test_the_layer_read_the_norm_and_the_class_token_are_options():
    pictures = pictures_of([1])
    for layer, stop in ((-1, 2), (-2, 1), (0, 0), (1, 1)):
        for norm in (False, True):
            for drop in (False, True):
                model = built(PREFIX, towers={"main": dict(TOWER, layer=layer, norm=norm, drop_class=drop)})
                vision = model.towers["main"]
                pixels = model.pixel_norms["main"](pictures.values)
                x = vision(pixels, collect=(0, 1, 2))[2][stop]
                x = (vision.post_norm(x) if norm else x)[:, int(drop) :]
                assert torch.equal(model.visual_tokens({"main": pixels})[0], model.connector(x, None)[0])
                assert model.picture_tokens == x.shape[1]
    with pytest.raises(ValueError, match="layer -4 of a tower of 2 blocks"):
        built(PREFIX, towers={"main": dict(TOWER, layer=-4)})


@torch.no_grad()
def test_parts_come_from_other_models():
    vision, words = dual_encoder(), language(depth=3)
    small = VocabularyLayout.of_text(40, {"eos": 1})
    words = shaken(words.options.model_copy(update={"vocab_size": 40}).build(small))
    options = open_options().with_parts({"towers.main": vision, "language": words})
    tower = options.towers["main"]
    assert (tower.width, tower.depth, tower.layer, tower.pictures.resize) == (12, 3, -2, "squash")
    assert options.language.depth == 3
    model = options.build(VOCABULARY).eval()
    model.take_part("towers.main", vision)
    model.take_part("language", words)
    pixels = torch.rand(2, 3, 16, 16)
    _, _, hidden = vision.vision(vision.pixel_norm(pixels), collect=(2,))
    expected = vision.vision.post_norm(hidden[2])[:, 1:]
    got = model.visual_tokens({"main": model.pixel_norms["main"](pixels)})[0]
    assert torch.equal(got, model.connector(expected, None)[0])
    rows = model.language.tokens.weight
    assert rows.shape == (61, 16)
    assert torch.equal(rows[:40], words.tokens.weight)
    assert torch.allclose(rows[40:], words.tokens.weight.mean(0).expand(21, -1))
    assert model.language.head is None
    text = rows_of([[2, 5, 6]])
    logits, _ = logits_of(model, batch_of(1, text=text))
    plain = words.encode(batch_of(1, text=text), {"text": frozenset({"vocabulary"})})["text"].vocabulary.logits()
    assert torch.allclose(logits[..., :40], plain, atol=1e-6)
    # a model of the family gives parts too
    other = open_options().with_parts({"towers.main": model, "language": model}).build(VOCABULARY)
    other.take_part("towers.main", model)
    other.take_part("language", model)
    other.take_part("connector", model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_an_untied_language_model_gets_rows_in_both_its_matrices():
    words = language(tie_embeddings=False, vocab_size=40)
    model = open_options(towers={"main": TOWER}).with_parts({"language": words}).build(VOCABULARY)
    model.take_part("language", words)
    for mine, theirs in ((model.language.tokens, words.tokens), (model.language.head, words.head)):
        assert torch.equal(mine.weight[:40], theirs.weight)
        assert torch.allclose(mine.weight[40:], theirs.weight.mean(0).expand(21, -1))


def test_parts_that_do_not_fit_are_refused():
    words, vision = language(), dual_encoder()
    with pytest.raises(ValueError, match="no part 'towers.side'"):
        open_options().with_parts({"towers.side": vision})
    with pytest.raises(ValueError, match="no vision tower"):
        open_options().with_parts({"towers.main": words})
    with pytest.raises(ValueError, match="no language model"):
        open_options().with_parts({"language": vision})
    with pytest.raises(ValueError, match="towers.main has no shape"):
        open_options().with_parts({"language": words}).build(VOCABULARY)
    with pytest.raises(ValueError, match="no language model"):
        open_options().build(VOCABULARY)
    model = answering()
    with pytest.raises(RequestError, match="no part 'towers.side'"):
        model.take_part("towers.side", vision)
    with pytest.raises(RequestError, match="no language model"):
        model.take_part("language", vision)
    with pytest.raises(CheckpointError, match=r"this model has no 'trunk.blocks.2"):
        model.take_part("towers.main", vision)
    with pytest.raises(CheckpointError, match=r"'tokens.weight' of the source is \(61, 24\)"):
        model.take_part("language", language(width=24))
    with pytest.raises(ValueError, match="needs <image>"):
        answering().options.build(VocabularyLayout.of_text(61, {}))
    with pytest.raises(ValueError, match="no gated block would stand"):
        answering({"kind": "cross-attention", "every": 5})
