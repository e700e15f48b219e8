"""SimMIM and classification by the model's head against their definitions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlm.models import VisionOptions
from vlm.models.swin import SwinOptions
from vlm.objectives import BuildContext, ClassificationOptions, MaskedPixelsOptions
from vlm.types import Batch, Context, Labels, Pictures, SingleProcess, Views, VocabularyLayout


def model_of(classes=(), **tower):
    torch.manual_seed(0)
    shape = {"image_size": 32, "width": 12, "depths": (1, 1), "heads": (2, 2), "window": 4, "mask_token": True}
    options = VisionOptions(tower=SwinOptions(**{**shape, **tower}), classes=classes)
    return options.build(VocabularyLayout({}, {})).eval()


def batch_of(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    masked = torch.rand(n, 4, 4, generator=generator) < 0.5
    masked[0] = False  # a picture of which nothing is hidden
    rows, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    image = Pictures(values, torch.ones(n, dtype=torch.bool), rows)
    labels = torch.tensor([0, 1, -1, 1, 0][:n])
    streams = {"image": image, "image.masked": replace(image, masked=masked), "label": Labels(labels, labels >= 0, rows)}
    return Batch(streams, [str(i) for i in range(n)], zeros, zeros)


def terms_of(objective, model, batch):
    wanted = {request.key: frozenset({request.wanted}) for request in objective.requires}
    views = Views({f"model/{key}": out for key, out in model.encode(batch, wanted).items()})
    return objective(views, Context(batch, SingleProcess()))


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_swin_v2_loss_is_the_mean_distance_over_hidden_pixel_values(distance):
    model, batch = model_of(), batch_of()
    objective = MaskedPixelsOptions(distance=distance).build(BuildContext(model))
    terms = terms_of(objective, model, batch)
    stream = batch["image.masked"]
    tokens = model.encode(batch, {"image.masked": frozenset({"tokens"})})["image.masked"].tokens
    # A 1 x 1 convolution over the map and pixel shuffle, as the paper writes the head.
    side = 32 // objective.stride
    weight = objective.head.weight[:, :, None, None]
    predicted = F.pixel_shuffle(F.conv2d(tokens.mT.reshape(5, -1, side, side), weight, objective.head.bias), objective.stride)
    pixels = model.pixel_norm(stream.values)
    hidden = stream.masked.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(pixels)
    difference = (predicted - pixels)[hidden]
    expected = (difference.abs() if distance == "l1" else difference.square()).mean()
    loss = terms.total() / terms.weights.sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert objective.count(batch).item() == terms.weights.sum().item() == hidden.sum().item()
    assert terms.weights[0] == 0


def test_micro_batches_have_the_loss_of_the_whole_and_masked_rows_none():
    model, batch = model_of(), batch_of()
    objective = MaskedPixelsOptions().build(BuildContext(model))
    whole = terms_of(objective, model, batch)
    parts = [terms_of(objective, model, part) for part in (batch.samples(0, 2), batch.samples(2, 5), batch.samples(5, 5))]
    torch.testing.assert_close(sum(part.total() for part in parts), whole.total(), atol=1e-2, rtol=1e-5)
    stream = batch["image.masked"]
    off = batch.with_streams({"image.masked": replace(stream, mask=torch.tensor([True, False, True, True, True]))})
    assert terms_of(objective, model, off).weights[1] == 0
    assert objective.count(off) == terms_of(objective, model, off).weights.sum()


def test_gradient_reaches_mask_token_tower_and_head():
    model, batch = model_of(norm_zero_init=False), batch_of()
    objective = MaskedPixelsOptions().build(BuildContext(model))
    terms_of(objective, model, batch).total().backward()
    for parameter in (model.tower.mask_token, model.tower.patch.weight, objective.head.weight):
        assert parameter.grad.abs().max() > 0


def test_classification_by_the_models_head_is_cross_entropy_of_its_columns():
    model, batch = model_of(classes=("z", "cat", "dog")), batch_of()
    objective = ClassificationOptions(head="model", smoothing=0.1).build(BuildContext(model, classes=("cat", "dog")))
    terms = terms_of(objective, model, batch)
    logits = model.encode(batch, {"image": frozenset({"logits"})})["image"].logits
    expected = F.cross_entropy(logits, torch.tensor([1, 2, 0, 2, 1]), reduction="none", label_smoothing=0.1)
    known = batch["label"].mask
    torch.testing.assert_close(terms.values[known], expected[known])
    assert terms.weights.tolist() == known.float().tolist()
    assert not list(objective.parameters())
    assert not objective.state_dict()


@pytest.mark.parametrize(
    ("options", "model", "words"),
    [
        (MaskedPixelsOptions(), {"mask_token": False}, "hide squares"),
        (MaskedPixelsOptions(), {"image_size": 36}, "no whole number of tokens"),
        (ClassificationOptions(head="model"), {}, "no class 'cat'"),
    ],
)
def test_what_cannot_be_built_says_why(options, model, words):
    with pytest.raises(ValueError, match=words):
        options.build(BuildContext(model_of(**model), classes=("cat",)))


def test_a_stream_that_hides_nothing_is_refused():
    model, batch = model_of(), batch_of()
    objective = MaskedPixelsOptions(stream="image").build(BuildContext(model))
    with pytest.raises(ValueError, match="hides nothing"):
        objective.count(batch)
