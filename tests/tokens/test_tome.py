"""ToMe inside vision towers: merging between attention and feed-forward layer."""

import pytest
import torch

from tests.models.model_makers import VOCABULARY, answering, pictures_of, shaken
from tests.tokens.oracle import tome
from tests.tokens.rows import TOWERS, check_cached_decoding, equal_bits
from vlm.models.dual_encoder import DualEncoderOptions
from vlm.models.layouts import LAYOUTS
from vlm.models.merging import run_merging
from vlm.tokens import MergePlan, TowerMergeOptions

TEXT = dict(width=16, depth=1, heads=2, length=8)


def merge(r=3, kind="constant", proportional=True, weighting="size", **rest):
    return {"remove": {"kind": kind, "r": r}, "apply": {"weighting": weighting, "proportional": proportional}, **rest}


def encoder(merging=None, **vision):
    torch.manual_seed(0)
    table = dict(width=12, depth=4, heads=2, image_size=32, patch_size=8, merge=merging) | vision
    options = DualEncoderOptions.model_validate(dict(embed_dim=8, vision=table, text=TEXT))
    return shaken(options.build(VOCABULARY))


def pixels(count=3):
    return pictures_of([count], size=32).values


@pytest.mark.parametrize("vision", [{}, {"class_token": False, "pool": "mean"}, {"class_token": False, "pool": "attention"}])
@torch.no_grad()
def test_core_tome_r_0_is_the_unmodified_tower_bit_for_bit(vision):
    plain, merging = encoder(**vision).vision, encoder(merge(0), **vision).vision
    for own, other in zip(merging(pixels(), (0, 2)), plain(pixels(), (0, 2))):
        if isinstance(own, dict):
            assert all(torch.equal(own[layer], other[layer]) for layer in other)
        else:
            assert torch.equal(own, other)


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("weighting", ["size", "mean"])
@torch.no_grad()
def test_core_tome_the_tower_is_attention_merge_feed_forward_by_loops(proportional, weighting):
    tower = encoder(merge(3, proportional=proportional, weighting=weighting)).vision.double()
    x = tower.stem(pixels(1).double())
    sizes, sets = torch.ones(17, dtype=torch.float64), [{i} for i in range(17)]
    for block in tower.trunk.blocks:
        y = block.norm1(x)
        q, (k, v) = block.attention.queries(y), block.attention.keys_values(y)
        logits = q @ k.transpose(-1, -2) * 6**-0.5 + (sizes.log() if proportional else 0.0)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.attention.out(attended)
        rows, sizes, joined = tome(x[0], k[0].mean(0), sizes, 3, 1, weighting)
        sets = [set().union(*(sets[i] for i in members)) for members in joined]
        x = rows[None] + block.ffn(block.norm2(rows[None]))
    run = tower.run(tower.stem(pixels(1).double()))
    assert torch.allclose(run.x, x, atol=1e-9)
    assert torch.allclose(run.sizes[0], sizes)
    assert run.sizes.sum() == 17
    assert [next(i for i, s in enumerate(sets) if token in s) for token in range(17)] == run.places[0].tolist()
    assert sets[0] == {0}  # the class token stays first, alone
    assert torch.allclose(tower(pixels(1).double())[1], tower.post_norm(x[:, 0]), atol=1e-9)


@torch.no_grad()
def test_core_tome_duplicated_patches_give_what_the_unmerged_tower_gives():
    """A picture of pairs of equal patches, at equal places: merging them changes no output."""
    plain, merging = encoder(class_token=False, pool="mean").vision, encoder(merge(8), class_token=False, pool="mean").vision
    for tower in (plain, merging):
        tower.position.copy_(tower.position[::2].repeat_interleave(2, 0))
    half = torch.rand(2, 3, 32, 4, 1, 8)
    picture = half.expand(-1, -1, -1, -1, 2, -1)[:, :, :, :2].flatten(3)  # patches 0 and 1, 2 and 3 alike
    assert picture.shape == (2, 3, 32, 32)
    assert merging.options.plan.pairs == (8, 4, 2, 1)
    assert merging.run(merging.stem(picture)).x.shape == (2, 1, 12)
    plan = MergePlan((8, 0, 0, 0), 0, "size", True, False)
    short = run_merging(merging.trunk, merging.stem(picture), plan)
    whole = plain.trunk(plain.stem(picture))[0]
    assert short.x.shape[1] == 8
    assert torch.allclose(short.x, whole[:, 1::2], atol=1e-5)
    weighted = (short.x * short.sizes[..., None]).sum(1) / 16
    assert torch.allclose(weighted, whole.mean(1), atol=1e-5)
    wrong = run_merging(merging.trunk, merging.stem(picture), MergePlan((8, 0, 0, 0), 0, "size", False, False))
    assert torch.allclose(wrong.x, short.x, atol=1e-5)  # every size is 2: the bias is the same for all keys
    restored = run_merging(merging.trunk, merging.stem(picture), MergePlan((8, 0, 0, 0), 0, "size", True, True))
    assert torch.allclose(restored.x, whole, atol=1e-5)


@torch.no_grad()
def test_core_tome_some_duplicated_patches_need_the_log_of_their_size():
    """Three of eight pairs of patches are alike and become one each: later blocks see sizes of 2 and of 1."""
    plain, merging = encoder(class_token=False, pool="mean").vision, encoder(merge(3), class_token=False, pool="mean").vision
    picture = torch.rand(2, 3, 4, 8, 4, 8)
    for row, column in ((0, 0), (2, 0), (3, 2)):
        picture[:, :, row, :, column + 1] = picture[:, :, row, :, column]
    for tower in (plain, merging):
        for first in (0, 8, 14):  # the places of those patches are alike too
            tower.position[first + 1] = tower.position[first]
    x = plain.stem(picture.flatten(4, 5).flatten(2, 3))
    whole = plain.trunk(x)[0]
    for proportional in (True, False):
        run = run_merging(merging.trunk, x, MergePlan((3, 0, 0, 0), 0, "size", proportional, True))
        assert torch.allclose(run.x, whole, atol=1e-5) is proportional


@torch.no_grad()
def test_core_tome_mean_and_attention_pooling_weigh_by_size():
    for pool in ("mean", "attention"):
        tower = encoder(merge(5), class_token=False, pool=pool).vision
        run = tower.run(tower.stem(pixels()))
        x, spread = tower.post_norm(run.x), run.places[..., None].expand(-1, -1, 12)
        every = x.gather(1, spread)  # as if each patch had what it became part of
        expected = every.mean(1) if pool == "mean" else tower.pool(every)
        assert torch.allclose(tower(pixels())[1], expected, atol=1e-5)


def test_core_tome_pairs_per_layer_are_constant_or_falling_and_never_more_than_half():
    def pairs(kind, r, depth, tokens, class_token=True):
        return list(TowerMergeOptions.model_validate(merge(r, kind)).plan(depth, tokens, class_token=class_token).pairs)

    assert pairs("constant", 13, 12, 197) == [13] * 12
    assert pairs("constant", 8, 4, 17) == [8, 4, 2, 1]
    assert pairs("decreasing", 8, 5, 197) == [16, 12, 8, 4, 0]
    assert sum(pairs("decreasing", 13, 12, 197)) in range(13 * 12 - 6, 13 * 12 + 1)
    assert pairs("constant", 8, 4, 16, class_token=False) == [8, 4, 2, 1]
    assert pairs("constant", 5, 1, 1) == [0]


def test_core_tome_trains_and_recompute_gives_the_same_gradients():
    gradients = []
    for on in (False, True):
        model = encoder(merge(3)).train()
        model.vision.trunk.recompute = on
        model.vision(pixels())[1].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.vision.named_parameters() if p.grad is not None})
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


@torch.no_grad()
def test_core_tome_at_inference_alone_a_training_step_merges_nothing():
    plain, merging = encoder().vision, encoder(merge(3, when="inference")).vision
    assert torch.equal(merging.train()(pixels())[1], plain.train()(pixels())[1])
    assert merging.eval()(pixels())[0].shape[1] == 17 - 12
    assert encoder(merge(3)).vision.train()(pixels())[0].shape[1] == 17 - 12


@torch.no_grad()
def test_core_tome_most_similar_pairs_change_less_than_drawn_ones():
    whole = encoder().vision(pixels(16))[1]
    lost = {}
    for metric in ("keys", "random"):
        short = encoder(merge(3, match={"metric": metric})).vision(pixels(16))[1]
        lost[metric] = float((short - whole).norm())
    assert 0 < lost["keys"] < lost["random"]


def test_core_tome_options_that_do_not_fit_are_refused_and_published_layouts_say_nothing_of_it():
    with pytest.raises(ValueError, match="class token would be merged"):
        encoder(merge(3, match={"protect": 0}))
    for published in LAYOUTS.values():
        assert not published.expresses(encoder(merge(3)).options)


@torch.no_grad()
def test_core_tome_in_the_tower_of_a_model_that_answers():
    full = answering(towers=TOWERS, length=96)
    none = answering(towers={"main": TOWERS["main"] | {"merge": merge(0)}}, length=96)
    assert equal_bits(full, none)
    for restore, left in ((False, 16 - 9), (True, 16)):
        model = answering(towers={"main": TOWERS["main"] | {"merge": merge(3, restore=restore)}}, length=96)
        assert model.picture_tokens == left
        check_cached_decoding(model)
        assert not equal_bits(full, model)
    late = answering(towers={"main": TOWERS["main"] | {"merge": merge(3, when="inference")}}, length=96)
    assert (late.picture_positions, late.training_positions) == (7, 16)
    assert equal_bits(late.train(), full.train())
