"""Towers of clips: exact checks of core-crossframe and xclip, ragged clips, gradients, what is refused."""

import pytest
import torch
from torch import nn

from tests.models.model_makers import VOCABULARY, batch_of, pictures_of, shaken
from vlm import ops
from vlm.config.errors import RequestError
from vlm.models import DualEncoderOptions, VisionOptions, load_model, save_model
from vlm.models.layouts import LAYOUTS
from vlm.models.video import Clips, VideoOptions, VideoTower
from vlm.types import Pictures

TEXT = dict(width=16, depth=1, heads=2, length=8)
WIDTH, SIDE = 12, 16
KINDS = ("mean-pool", "message-token", "divided")


def options(kind="message-token", layers=1, positions=True, **changes):
    table = dict(kind="video", width=WIDTH, depth=3, heads=2, image_size=SIDE, patch_size=8, frames=5,
                 temporal={"kind": kind, **changes.pop("temporal", {})}, integration={"layers": layers, "positions": positions})
    return VideoOptions.model_validate(table | changes)


def tower(kind="message-token", *, shake=0.3, **changes):
    torch.manual_seed(0)
    return shaken(VideoTower(options(kind, **changes), 8), shake).double()


def frames(count, seed=0):
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clips(counts):
    return Clips.of(pictures_of(counts, size=SIDE))


def by_torch(module):
    """torch's own attention with the weights of one of ours."""
    attention, width = module.attention, module.attention.q.in_features
    peer = nn.MultiheadAttention(width, attention.heads, batch_first=True).double()
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]))
        peer.in_proj_bias.copy_(torch.cat([attention.q.bias, attention.k.bias, attention.v.bias]))
        peer.out_proj.load_state_dict(attention.out.state_dict())
    return peer.eval()


@torch.no_grad()
def test_core_crossframe_the_tower_is_two_calls_of_torch_attention_a_block():
    own = tower()
    x = own.stem(frames(4))
    got = own.frames(x, clips([4]))[0]
    for block, part in zip(own.trunk.blocks, own.across):
        y = part.norm(m := part.message(x[:, 0])[None])
        m = m + by_torch(part)(y, y, y, need_weights=False)[0]
        z = torch.cat([x, m[0][:, None]], 1)
        y = block.norm1(z)
        z = z + by_torch(block)(y, y, y, need_weights=False)[0]
        x = z[:, :-1] + block.ffn(block.norm2(z[:, :-1]))
    assert torch.allclose(got, x, atol=1e-12)


@torch.no_grad()
def test_core_crossframe_one_frame_reads_the_values_of_its_own_message():
    own = tower()
    part, x = own.across[0], own.stem(frames(3))
    message = part.message(x[:, 0])
    alone = message + part.attention.out(part.attention.v(part.norm(message)))
    assert torch.allclose(part.exchanged(x[:, 0], clips([1, 1, 1])), alone, atol=1e-12)


@pytest.mark.parametrize("temporal", [{}, {"positions": False, "zero_init": False}])
@torch.no_grad()
def test_core_crossframe_permuting_frames_permutes_what_the_blocks_give(temporal):
    own = tower("divided" if temporal else "message-token", temporal=temporal)
    pixels, order = frames(5), torch.tensor([3, 0, 4, 1, 2])
    x = own.frames(own.stem(pixels), clips([5]))[0]
    permuted = own.frames(own.stem(pixels[order]), clips([5]))[0]
    assert torch.allclose(permuted, x[order], atol=1e-12)
    assert not torch.allclose(permuted, x, atol=1e-3)


@torch.no_grad()
def test_xclip_the_order_of_frames_counts_by_the_positions_alone():
    pixels = frames(5)
    for positions, same in ((True, False), (False, True)):
        own = tower(positions=positions)
        one, two = own(pixels, clips=clips([5]))[1], own(pixels.flip(0), clips=clips([5]))[1]
        assert torch.allclose(one, two, atol=1e-12) is same
    own = tower()
    own.integration.positions.zero_()
    assert torch.allclose(own(pixels, clips=clips([5]))[1], own(pixels.flip(0), clips=clips([5]))[1], atol=1e-12)


@torch.no_grad()
def test_xclip_messages_are_the_only_way_between_frames():
    pixels = frames(4)
    for kind in ("message-token", "divided"):
        own = tower(kind)
        together, apart = (own.frames(own.stem(pixels), group)[0] for group in (clips([4]), clips([1] * 4)))
        assert not torch.allclose(together, apart, atol=1e-3)
    own = tower()
    for part in own.across:  # what the exchange adds is gone: each message is that of its own frame
        part.attention.out.weight.zero_()
        part.attention.out.bias.zero_()
    together, apart = (own.frames(own.stem(pixels), group)[0] for group in (clips([4]), clips([1] * 4)))
    assert torch.allclose(together, apart, atol=1e-12)


@torch.no_grad()
def test_xclip_integration_of_zero_weights_is_the_mean_of_the_frames():
    own, plain = tower(), tower(layers=0)
    plain.load_state_dict(own.state_dict(), strict=False)
    for block in own.integration.trunk.blocks:
        for linear in (block.attention.out, block.ffn.down):
            linear.weight.zero_()
            linear.bias.zero_()
    own.integration.positions.zero_()
    x, got, _ = own(frames(4), clips=clips([4]))
    assert torch.allclose(got[0], 2 * plain(frames(4), clips=clips([4]))[1][0], atol=1e-12)  # c + identity(c)
    assert torch.allclose(plain(frames(4), clips=clips([4]))[1][0], own.project(own.post_norm(x[:, 0])).mean(0), atol=1e-12)


@pytest.mark.parametrize("kind", ["mean-pool", "divided"])
@torch.no_grad()
def test_a_fresh_divided_tower_and_mean_pooling_are_the_tower_of_single_frames(kind):
    own = tower(kind, layers=0, shake=0.0)
    own.trunk.load_state_dict(shaken(own.trunk, 0.3).state_dict())
    together, apart = own(frames(4), clips=clips([4]))[1], own(frames(4))[1]
    assert torch.allclose(together[0], apart.mean(0), atol=1e-12)


@torch.no_grad()
def test_core_crossframe_divided_is_attention_over_frames_then_the_block():
    own = tower("divided", temporal={"zero_init": False})
    pixels = frames(3)
    x = own.stem(pixels) + own.frame_position[:3, None]
    got = own.frames(own.stem(pixels), clips([3]))[0]
    for block, part in zip(own.trunk.blocks, own.across):
        y = part.norm(x).transpose(0, 1)  # positions, frames
        x = x + by_torch(part)(y, y, y, need_weights=False)[0].transpose(0, 1)
        y = block.norm1(x)
        x = x + by_torch(block)(y, y, y, need_weights=False)[0]
        x = x + block.ffn(block.norm2(x))
    assert torch.allclose(got, x, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ragged_clips_are_each_clip_alone_in_any_order_of_rows(kind):
    own, counts = tower(kind), [2, 5, 1, 3]
    pixels, stream = frames(11), pictures_of(counts, size=SIDE)
    shuffled = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    rows = stream.rows(shuffled)
    together = own(pixels[shuffled], clips=Clips.of(rows))[1]
    start = 0
    for clip, count in enumerate(counts):
        alone = own(pixels[start : start + count], clips=clips([count]))[1][0]
        assert torch.allclose(together[clip], alone, atol=1e-12)
        start += count


@torch.no_grad()
def test_a_masked_frame_is_as_if_it_were_not_there_whatever_it_holds():
    own = tower()
    stream = pictures_of([3, 2], size=SIDE)
    mask = torch.tensor([True, True, False, True, True])
    held = Clips.of(Pictures(stream.values, mask, stream.sample_index, stream.slot))
    pixels = frames(5)
    pixels[2] = torch.nan
    got = own(pixels, clips=held)[1]
    assert torch.allclose(got, own(pixels[[0, 1, 3, 4]], clips=clips([2, 2]))[1], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_crossframe_gradients_are_those_of_float64_and_recompute_changes_none(kind, backend):
    wide = tower(kind).train()
    single = tower(kind).float().train()
    weights = torch.rand(3, 8, generator=torch.Generator().manual_seed(3))

    def gradients(model, pixels):
        model.zero_grad()
        (model(pixels, clips=clips([2, 4, 1]))[1] * weights.to(pixels)).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(wide, frames(7))
    with ops.backend(backend):
        got = gradients(single, frames(7).float())
        assert {n for n in expected if n.startswith(("across", "integration"))} == {
            n for n, _ in wide.named_parameters() if n.startswith(("across", "integration"))
        }
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp(min=1.0)
            assert (got[name] - gradient).abs().max() <= 2e-4 * scale, name
        single.trunk.recompute = True
        again = gradients(single, frames(7).float())
    assert all(torch.equal(again[name], got[name]) for name in got)


@torch.no_grad()
def test_a_model_gives_one_row_a_clip(tmp_path):
    torch.manual_seed(0)
    dual = DualEncoderOptions.model_validate(dict(embed_dim=8, vision=options().model_dump(), text=TEXT))
    model = shaken(dual.build(VOCABULARY))
    stream = pictures_of([3, 1, 2], size=SIDE)
    fields = frozenset({"embedding", "tokens", "hidden:2"})
    out = model.encode(batch_of(3, image=stream), {"image": fields})["image"]
    assert out.sample_index.tolist() == [0, 1, 2]
    assert out.embedding.shape == (3, 8)
    assert out.tokens.shape == (3, 3 * 4, 8)
    assert out.hidden[2].shape == (3, 3 * 5, WIDTH)
    assert out.token_mask.sum(1).tolist() == [12, 4, 8]
    assert model.frames == 5
    assert not any(layout.expresses(dual) for layout in LAYOUTS.values())
    save_model(model, tmp_path)
    again = load_model(tmp_path).encode(batch_of(3, image=stream), {"image": fields})["image"]
    assert torch.equal(again.embedding, out.embedding)
    with pytest.raises(RequestError, match="clips"):
        model.export_parts()


@torch.no_grad()
def test_a_vision_model_names_the_class_of_a_clip():
    model = VisionOptions.model_validate({"tower": options(pool="mean").model_dump(), "classes": ["left", "right"]}).build(VOCABULARY)
    stream = pictures_of([5, 4], size=SIDE)
    out = model.encode(batch_of(2, image=stream), {"image": frozenset({"logits"})})["image"]
    assert out.logits.shape == (2, 2)
    assert out.embedding is None
    none = model.encode(batch_of(0, image=stream.rows(torch.arange(0))), {"image": frozenset({"logits", "tokens"})})["image"]
    assert none.logits.shape == (0, 2)


def test_what_is_no_clip_is_refused():
    with pytest.raises(ValueError, match="class_token"):
        options(class_token=False, pool="mean")
    with pytest.raises(ValueError, match="at most 5"):
        Clips.of(pictures_of([6]), 5)
    stream = pictures_of([2])
    with pytest.raises(ValueError, match="tiles"):
        Clips.of(Pictures(stream.values, stream.mask, stream.sample_index, place=torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="divisor"):
        VideoTower(options(integration={"layers": 1, "heads": 3}), 8)
