"""The Swin tower and the vision family: equal to transformers, exact checks of swin-v2, layouts, hidden squares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlm import ops
from vlm.config.errors import CheckpointError
from vlm.models import DualEncoderOptions, VisionOptions, load_model, save_model
from vlm.models.swin import ContinuousBias, SwinBlock, SwinOptions, SwinTower
from vlm.models.swin.blocks import log_offsets
from vlm.types import Batch, Pictures, VocabularyLayout

SHAPE = {"patch_size": 4, "depths": (2, 2, 2), "heads": (2, 3, 4), "width": 24, "window": 4}


def options(**changes) -> SwinOptions:
    return SwinOptions(**{"image_size": 64, **SHAPE, **changes})


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """With weights of no meaning everywhere, also where a fresh model has zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def batch_of(pixels: torch.Tensor, masked: torch.Tensor | None = None) -> Batch:
    n = len(pixels)
    zeros = torch.zeros(n, dtype=torch.int64)
    stream = Pictures(pixels, torch.ones(n, dtype=torch.bool), torch.arange(n), masked=masked)
    return Batch({"image": stream}, [str(i) for i in range(n)], zeros, zeros)


@pytest.mark.parametrize(
    ("config", "sides"),
    [
        ({"image_size": 64, "window_size": 4}, (64,)),
        ({"image_size": 72, "window_size": 4}, (72, 70)),  # padded windows, padded merging, padded patches
        ({"image_size": 64, "window_size": 8, "pretrained_window_sizes": [4, 4, 4]}, (64, 96, 80)),
        ({"image_size": 60, "window_size": 7, "qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}, (60,)),
    ],
    ids=["whole", "padded", "pretrained-window", "odd"],
)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_swin_v2_equals_transformers_with_the_same_weights(config, sides, backend, tmp_path):
    from transformers import Swinv2Config, Swinv2Model

    theirs = shaken(Swinv2Model(Swinv2Config(patch_size=4, embed_dim=24, depths=[2, 2, 2], num_heads=[2, 3, 4], **config)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").eval()
    save_model(ours, tmp_path / "ours")
    back = Swinv2Model.from_pretrained(tmp_path / "ours").state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())
    for side in sides:
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        with torch.no_grad(), ops.backend(backend):
            wanted, (tokens, pooled, _) = theirs(pixels), ours.tower(pixels)
        torch.testing.assert_close(tokens, wanted.last_hidden_state, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(pooled, wanted.pooler_output, atol=5e-5, rtol=1e-4)


def test_swin_v2_gradients_equal_those_of_transformers(tmp_path):
    from transformers import Swinv2Config, Swinv2Model

    config = Swinv2Config(image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 3], window_size=4)
    theirs = shaken(Swinv2Model(config))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    pixels = torch.randn(2, 3, 64, 64)
    theirs(pixels).pooler_output.square().sum().backward()
    with ops.backend("native"):
        ours.tower(pixels)[1].square().sum().backward()
    mine, other = ours.tower.stages[0].blocks[1], theirs.encoder.layers[0].blocks[1]
    for a, b in (
        (mine.attention.log_scale, other.attention.self.logit_scale),
        (mine.attention.position.hidden.weight, other.attention.self.continuous_position_bias_mlp[0].weight),
        (mine.attention.q_bias, other.attention.self.query.bias),
        (mine.norm1.weight, other.layernorm_before.weight),
        (mine.up.weight, other.intermediate.dense.weight),
    ):
        torch.testing.assert_close(a.grad.reshape(-1), b.grad.reshape(-1), atol=1e-4 * float(b.grad.abs().max()), rtol=1e-3)


def test_a_published_classifier_keeps_its_head_and_names(tmp_path):
    from transformers import Swinv2Config, Swinv2ForImageClassification

    config = Swinv2Config(image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 3], window_size=4,
                          id2label={0: "cat", 1: "dog", 2: "hat"}, label2id={"cat": 0, "dog": 1, "hat": 2})  # fmt: skip
    theirs = shaken(Swinv2ForImageClassification(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").eval()
    assert ours.classes == ("cat", "dog", "hat")
    save_model(ours, tmp_path / "ours")
    back = Swinv2ForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert back.config.id2label == {0: "cat", 1: "dog", 2: "hat"}
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        logits = ours.encode(batch_of(pixels), {"image": frozenset({"logits"})})["image"].logits
        wanted = theirs(ours.pixel_norm(pixels)).logits
        assert torch.equal(back(ours.pixel_norm(pixels)).logits, wanted)
    torch.testing.assert_close(logits, wanted, atol=5e-5, rtol=1e-4)


def test_an_older_directory_with_computed_tensors_and_its_preprocessing_loads(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Swinv2Config, Swinv2Model

    theirs = shaken(Swinv2Model(Swinv2Config(image_size=64, embed_dim=24, depths=[2], num_heads=[2], window_size=4)))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    place = "encoder.layers.0.blocks.0.attention.self."
    tensors |= {place + "relative_coords_table": torch.zeros(1, 7, 7, 2), place + "relative_position_index": torch.zeros(16, 16)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(
        '{"do_resize": true, "size": {"height": 64, "width": 64}, "resample": 3, "do_normalize": true, '
        '"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "image_processor_type": "ViTImageProcessor"}'
    )
    ours = load_model(tmp_path).eval()
    assert ours.options.pictures.resize == "squash"
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.tower(pixels)[1], theirs(pixels).pooler_output, atol=5e-5, rtol=1e-4)


def test_hidden_squares_equal_those_of_transformers(tmp_path):
    from transformers import Swinv2Config, Swinv2ForMaskedImageModeling

    config = Swinv2Config(image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 3], window_size=4, encoder_stride=8)
    theirs = shaken(Swinv2ForMaskedImageModeling(config))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    masked = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    patches = masked.repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs.swinv2(ours.pixel_norm(pixels), bool_masked_pos=patches).last_hidden_state
        tokens = ours.encode(batch_of(pixels, masked), {"image": frozenset({"tokens"})})["image"].tokens
        other = pixels.clone()
        other[masked.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(pixels)] = 0.3
        same = ours.encode(batch_of(other, masked), {"image": frozenset({"tokens"})})["image"].tokens
    torch.testing.assert_close(tokens, wanted, atol=5e-5, rtol=1e-4)
    assert torch.equal(tokens, same)  # what is hidden is not seen


def test_swin_v2_a_block_with_zero_norm_weights_returns_its_input_bit_for_bit():
    shape = options()
    for shift in (0, 2):
        block = SwinBlock(shape, shape.stages[0], shift=shift, drop=0.0)
        x = torch.randn(2, 16, 16, 24)
        for backend in ("native", "torch"):
            with ops.backend(backend):
                assert torch.equal(block(x), x)


def test_swin_v2_the_bias_table_of_a_larger_window_holds_that_of_the_pre_trained_one():
    small, large = ContinuousBias(3, 8), ContinuousBias(3, 16, pretrained_window=8)
    large.load_state_dict(small.state_dict())
    common = large().reshape(31, 31, 3)[8:23, 8:23].reshape(-1, 3)
    torch.testing.assert_close(common, small(), atol=1e-6, rtol=0)
    assert torch.equal(log_offsets(16, 8).reshape(31, 31, 2)[8:23, 8:23].reshape(-1, 2), log_offsets(8))
    assert float(log_offsets(8).max()) == pytest.approx(torch.log2(torch.tensor(9.0)).item() / 3)


def test_swin_v2_no_gradient_where_the_scale_is_clamped_and_keys_have_no_bias():
    tower = shaken(SwinTower(options(), 1, project=False))
    attention = tower.stages[0].blocks[0].attention
    with torch.no_grad():
        attention.log_scale[0] = 9.0
    tower(torch.randn(1, 3, 64, 64))[1].square().sum().backward()
    assert attention.scale()[0].item() == pytest.approx(100.0)
    assert attention.log_scale.grad[0] == 0
    assert attention.log_scale.grad[1] != 0
    assert not any("k_bias" in name for name, _ in tower.named_parameters())


def test_swin_v2_activations_do_not_grow_with_the_weights_of_branches_as_they_do_with_norms_in_front():
    growth = {}
    for norm in ("res-post", "pre"):
        sizes = []
        for factor in (1, 100):
            torch.manual_seed(0)
            tower = SwinTower(options(depths=(6,), heads=(2,), norm=norm, norm_zero_init=False), 1, project=False).eval()
            with torch.no_grad():
                for name, parameter in tower.named_parameters():
                    if name.endswith((".out.weight", ".down.weight")) and "position" not in name:
                        parameter.mul_(10 * factor)
                hidden = tower(torch.ones(2, 3, 64, 64).cumsum(3) / 32, {6})[2]
            sizes.append(float(hidden[6].square().mean().sqrt()))
        growth[norm] = sizes[1] / sizes[0]
    assert growth["res-post"] < 1.1
    assert growth["pre"] > 2 * growth["res-post"]


def test_padding_masked_differs_from_attended_only_where_there_is_some():
    for side, same in ((64, True), (72, False)):
        towers = [shaken(SwinTower(options(image_size=side, padding=padding), 1, project=False)) for padding in ("masked", "attended")]
        towers[1].load_state_dict(towers[0].state_dict())
        pixels = torch.randn(1, 3, side, side)
        with torch.no_grad():
            one, two = (tower(pixels)[0] for tower in towers)
        assert torch.allclose(one, two, atol=1e-5) is same


def test_a_layout_that_cannot_say_the_model_is_not_used(tmp_path):
    for changes in ({"image_size": 72}, {"norm": "pre"}, {"main_norm_every": 2}):
        model = shaken(VisionOptions(tower=options(**changes)).build(VocabularyLayout({}, {})))
        save_model(model, tmp_path / "saved")
        assert '"vlm-vision"' in (tmp_path / "saved" / "config.json").read_text()
        loaded = load_model(tmp_path / "saved")
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_a_dual_encoder_takes_a_swin_tower(tmp_path):
    made = DualEncoderOptions.model_validate(
        {
            "embed_dim": 16,
            "vision": {"kind": "swin", "image_size": 64, **SHAPE},
            "text": {"width": 24, "depth": 1, "heads": 3, "length": 8, "vocab_size": 40, "eos_id": 1},
        }
    )
    model = shaken(made.build(VocabularyLayout.of_text(40, {"eos": 1})))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).eval()
    outputs = loaded.encode(batch_of(torch.rand(2, 3, 64, 64)), {"image": frozenset({"embedding", "tokens", "hidden:3"})})["image"]
    assert outputs.embedding.shape == (2, 16)
    assert outputs.tokens.shape == (2, 16, 16)
    assert outputs.hidden[3].shape == (2, 64, 48)
    torch.testing.assert_close(outputs.tokens.mean(1), outputs.embedding, atol=1e-5, rtol=1e-4)


def test_a_vision_model_may_have_a_vit():
    model = VisionOptions.model_validate(
        {"tower": {"width": 24, "depth": 1, "heads": 3, "image_size": 32, "patch_size": 8}, "classes": ["a", "b"]}
    ).build(VocabularyLayout({}, {}))
    outputs = model.encode(batch_of(torch.rand(2, 3, 32, 32)), {"image": frozenset({"embedding", "logits"})})["image"]
    assert (outputs.embedding.shape, outputs.logits.shape) == ((2, 24), (2, 2))


def test_recomputing_gives_the_same_gradients():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = shaken(VisionOptions(tower=options()).build(VocabularyLayout({}, {})))
        model.set_recompute(recompute)
        model.encode(batch_of(torch.ones(1, 3, 64, 64)), {"image": frozenset({"embedding"})})["image"].embedding.sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_stochastic_depth_only_while_training():
    tower = shaken(SwinTower(options(drop_path=0.5), 1, project=False))
    pixels = torch.randn(4, 3, 64, 64)
    assert torch.equal(tower(pixels)[1], tower(pixels)[1])
    tower.train()
    torch.manual_seed(0)
    assert not torch.equal(tower(pixels)[1], tower(pixels)[1])


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one a stage"):
        options(heads=(2, 3))
    with pytest.raises(ValueError, match="no multiple"):
        options(heads=(5, 3, 4))
    with pytest.raises(ValueError, match="leaves nothing"):
        options(image_size=12)
    with pytest.raises(ValueError, match="distinct"):
        VisionOptions(tower=options(), classes=("a", "a"))
    tower = SwinTower(options(), 1, project=False)
    with pytest.raises(ValueError, match="mask_token"):
        tower(torch.zeros(1, 3, 64, 64), (), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not fall"):
        SwinTower(options(mask_token=True), 1)(torch.zeros(1, 3, 64, 64), (), torch.zeros(1, 5, 5, dtype=torch.bool))
    (tmp_path / "config.json").write_text('{"model_type": "swinv2", "use_absolute_embeddings": true}')
    with pytest.raises(CheckpointError, match="use_absolute_embeddings"):
        load_model(tmp_path)
