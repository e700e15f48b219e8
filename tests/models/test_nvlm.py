"""nvlm with tiles: what tags and text may see, thumbnails in the row and tiles beside it, cached decoding, gates at 0."""

from dataclasses import replace

import pytest
import torch

from tests.models.model_makers import answering, batch_of, logits_of, pictures_of, rows_of
from vlm.models import load_model
from vlm.models.directory import save_model
from vlm.models.vision_language.expand import announced, place_pictures
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.tiling import THUMBNAIL, Tiling
from vlm.types.batch import Role
from vlm.types.layout import Modality

IMAGE, N = 3, 4
D, X, H = {"kind": "prefix"}, {"kind": "cross-attention", "every": 2}, {"kind": "hybrid", "every": 2}
FORMS = pytest.mark.parametrize("fusion", [D, X, H], ids=["D", "X", "H"])
GATED = pytest.mark.parametrize("fusion", [X, H], ids=["X", "H"])
TAGS = {(0, 0): [20], (0, 1): [21, 22], (1, 0): [23], (1, 1): [24], THUMBNAIL: [30, 31]}  # ragged on purpose
TWO = [(0, 0), (0, 1), THUMBNAIL]


def built(fusion, gates=(0.8, -0.6), **changes):
    model = answering(fusion, tiler={}, **changes)
    with torch.no_grad():
        for block in model.cross.values():
            block.attention_gate.fill_(gates[0])
            block.ffn_gate.fill_(gates[1])
    return model


def row_of(parts):
    """(ids, role, places): parts are ids of text, or lists of places of the tiles of one picture."""
    ids, role, places = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            role.append(int(Role.INSTRUCTION))
            continue
        for place in part:
            ids += [*TAGS[place], IMAGE]
            role += [int(Role.TAG)] * len(TAGS[place]) + [int(Role.CONTEXT)]
        places.append(part)
    return ids, role, places


def tiled(*rows, seed=0, side="right", extra=0):
    """A batch of rows as `row_of` takes them, one sample each."""
    made = [row_of(row) for row in rows]
    text = rows_of([ids for ids, _, _ in made], role=[role for _, role, _ in made], side=side, extra=extra)
    pictures = pictures_of([sum(map(len, places)) for _, _, places in made], seed=seed)
    flat = [(slot, 0, *place) for _, _, places in made for slot, own in enumerate(places) for place in own]
    numbers = torch.tensor(flat, dtype=torch.int64).reshape(-1, 4)
    pictures = replace(pictures, slot=numbers[:, 0], place=numbers[:, 1:])
    return batch_of(len(rows), text=text, image=pictures)


ROWS = [[2, 5, TWO, 6, 7], [2, 8, 9], [2, [THUMBNAIL], 10, [(0, 0), (1, 0), THUMBNAIL], 11, 12], [2, [THUMBNAIL], 13]]


def text_logits(model, batch):
    """Logits of the positions of text of each row, in order."""
    logits, layout = logits_of(model, batch)
    keep = layout.mask & (layout.modality == int(Modality.TEXT))
    return [logits[row, keep[row]] for row in range(len(keep))]


def changed(batch, row, amount=0.5):
    values = batch["image"].values.clone()
    values[row] = (values[row] + amount) % 1
    return batch.with_streams({"image": replace(batch["image"], values=values)})


def test_the_tiler_is_kept_with_the_model(tmp_path):
    model = answering(tiler={"max_tiles": 4, "thumbnail": "first", "before": "<Image>"}, shake=0.0)
    assert model.tiling == Tiling(16, 4, thumbnail="first", before="<Image>")
    assert model.preprocesses()["image"] == Preprocess(16, "squash")
    save_model(model, tmp_path)
    assert load_model(tmp_path).tiling == model.tiling
    assert (answering().tiling, answering().preprocess().resize) == (None, "shortest")
    assert "vision" in model.export_parts()
    assert set(answering(H, tiler={"max_tiles": 4}).export_parts()) == {"vision", "embed", "cross", "decoder"}


def test_a_tag_is_of_the_next_placeholder():
    batch = tiled(ROWS[0], ROWS[2], side="left", extra=1)
    text = batch["text"]
    visual = answering(D)._visual_of_batch(batch, "image")
    places = place_pictures(text, IMAGE, visual, keys=batch.keys, name="text", context="image")
    own = announced(text, places)
    for row in range(2):
        ids = text.values[row].tolist()
        for column in range(len(ids)):
            if int(text.role[row, column]) == int(Role.TAG):
                assert int(own[row, column]) == next(c for c in range(column, len(ids)) if ids[c] == IMAGE)
            else:
                assert int(own[row, column]) == -1
    assert announced(replace(text, role=None), places) is None


def gated_input_and_output(model, batch):
    """What goes into and comes out of the attention of the first gated block: [n, N, C] each."""
    seen = {}
    block = model.cross["2"]
    handle = block.register_forward_hook(lambda module, given, out: seen.update(x=given[0], out=out))
    logits_of(model, batch)
    handle.remove()
    return seen["x"], seen["out"]


@torch.no_grad()
def test_nvlm_x_a_tag_sees_its_own_tile_alone():
    """Changing tile k's pixels leaves the first gated layer unchanged at the tags of other tiles, and at what is before."""
    model = built(X)
    places = [(0, 0), (0, 1), (1, 0), (1, 1), THUMBNAIL]
    batch = tiled([2, 5, places, 6, 7, [(0, 0), THUMBNAIL], 8])
    own = []  # of each column, the row of pictures that it announces
    text, at = batch["text"], 0
    for token, role in zip(text.values[0].tolist(), text.role[0].tolist()):
        own.append(at if role == int(Role.TAG) else None)
        at += token == IMAGE
    before_x, before = gated_input_and_output(model, batch)
    for k in range(7):
        x, after = gated_input_and_output(model, changed(batch, k))
        assert torch.equal(x, before_x)  # no visual token is in the row
        for column, tag in enumerate(own):
            same = torch.equal(before[0, column], after[0, column])
            if tag is not None:
                assert same == (tag != k), (k, column)
            else:  # other text and placeholders: all tiles that stand before
                assert same == (column < [i for i, t in enumerate(text.values[0].tolist()) if t == IMAGE][k]), (k, column)


@torch.no_grad()
def test_nvlm_x_a_tag_equals_attention_to_its_tile():
    model = built(X)
    batch = tiled([2, 5, TWO, 6])
    x, out = gated_input_and_output(model, batch)
    tokens = model.visual_tokens({"main": model.pixel_norms["main"](batch["image"].values)})[0]
    block = model.cross["2"]
    for column, tile in ((2, 0), (4, 1), (5, 1), (7, 2), (8, 2)):
        keys, values = block.attention.keys_values(tokens[tile][None])
        here = x[:, column : column + 1]
        expected = block(here, keys, values, torch.zeros(1, 1, 1, N), torch.ones(1, 1, 1, dtype=torch.bool))
        assert torch.allclose(out[0, column], expected[0, 0], atol=1e-5)


@FORMS
@torch.no_grad()
def test_nvlm_masked_tiles_are_as_none(fusion):
    model = built(fusion)
    whole, short = tiled([2, 5, TWO, 6, 7]), tiled([2, 5, [(0, 0), THUMBNAIL], 6, 7])
    mask = torch.tensor([True, False, True])
    values = whole["image"].values.clone()
    short_image = replace(short["image"], values=values[mask])
    masked = replace(whole["image"], mask=mask, values=torch.where(mask[:, None, None, None], values, torch.nan))
    expected = text_logits(model, short.with_streams({"image": short_image}))
    got = text_logits(model, short.with_streams({"image": masked}))
    assert torch.isfinite(got[0]).all()
    assert torch.allclose(got[0], expected[0], atol=1e-5)


@GATED
def test_nvlm_rows_of_text_alone_skip_the_blocks(fusion):
    model = built(fusion)
    batch = tiled(ROWS[1], ROWS[0])
    plain = model.language.encode(batch_of(1, text=rows_of([row_of(ROWS[1])[0]])), {"text": frozenset({"vocabulary"})})
    assert torch.allclose(text_logits(model, batch)[0], plain["text"].vocabulary.logits()[0], atol=1e-6)
    for parameter in model.cross.parameters():
        parameter.data.fill_(torch.nan)
    assert torch.isfinite(logits_of(model, tiled(ROWS[1]))[0]).all()


@torch.no_grad()
def test_nvlm_x_gates_at_zero_with_tiles_equal_the_language_model_bit_for_bit():
    model = built(X, gates=(0.0, 0.0))
    batch = tiled(*ROWS)
    logits, layout = logits_of(model, batch)
    plain = model.language.encode(batch_of(4, text=batch["text"]), {"text": frozenset({"vocabulary"})})["text"]
    assert torch.equal(logits, plain.vocabulary.logits())
    assert torch.equal(layout.mask, plain.layout.mask)


@GATED
def test_nvlm_gates_at_zero_have_a_gradient(fusion):
    model = built(fusion, gates=(0.0, 0.0))
    logits, layout = logits_of(model, tiled(*ROWS))
    logits[layout.mask].logsumexp(-1).sum().backward()
    for block in model.cross.values():
        assert block.attention_gate.grad.abs() > 1e-6
        assert block.ffn_gate.grad.abs() > 1e-6


def same_weights(fusion, other):
    """This form with the weights of another model, its own blocks beside them."""
    model = built(fusion)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("cross.") for name in missing)
    return model


def thumbnails_alone(batch):
    """What the data give of the same pictures when each is read as one tile."""
    image = batch["image"]
    whole = (image.place[:, 1:] == torch.tensor(THUMBNAIL)).all(1)
    return batch.with_streams({"image": image.rows(whole)})


@torch.no_grad()
def test_nvlm_h_with_zero_tiles_is_d_on_the_thumbnail():
    d = built(D)
    h = same_weights(H, d)
    batch = tiled([2, [THUMBNAIL], 5, 6], [2, 8], [2, [THUMBNAIL], 10, [THUMBNAIL], 11])
    one, layout = logits_of(d, batch)
    two, other = logits_of(h, batch)
    assert torch.equal(one, two)
    assert torch.equal(layout.mask, other.mask)
    assert torch.equal(layout.picture, other.picture)


@torch.no_grad()
def test_nvlm_h_with_gates_at_zero_is_d_on_the_thumbnail():
    d = built(D)
    h = same_weights(H, d)
    for block in h.cross.values():
        block.attention_gate.zero_()
        block.ffn_gate.zero_()
    for side in ("left", "right"):
        rows = [[2, 5, TWO, 6, 7], [2, 8, 9], [2, [THUMBNAIL], 10, [(0, 0), (1, 0), THUMBNAIL], 11, 12]]
        alone = [[[THUMBNAIL] if isinstance(part, list) else part for part in row] for row in rows]
        full = tiled(*rows, side=side)
        small = tiled(*alone, side=side).with_streams({"image": thumbnails_alone(full)["image"]})
        logits, layout = logits_of(h, full)
        expected, other = logits_of(d, small)
        assert torch.equal(layout.mask, other.mask)
        assert torch.equal(logits[layout.mask], expected[other.mask])
        assert torch.equal(layout.position, other.position)
        assert torch.equal(layout.label, other.label)


@torch.no_grad()
def test_nvlm_h_keys_of_a_tile_are_its_tag_and_its_tokens():
    model = built(H)
    batch = tiled([2, 5, TWO, 6, [(0, 0), THUMBNAIL], 7])
    seen = {}
    block = model.cross["2"]
    handle = block.register_forward_pre_hook(lambda module, given: seen.update(keys=given[1], values=given[2], bias=given[3]))
    _, layout = logits_of(model, batch)
    handle.remove()
    tokens = model.visual_tokens({"main": model.pixel_norms["main"](batch["image"].values)})[0]
    embedding = model.language.tokens.weight
    parts = [embedding[[20]], tokens[0], embedding[[21, 22]], tokens[1], embedding[[20]], tokens[3]]
    keys, values = block.attention.keys_values(torch.cat(parts)[None])
    assert torch.allclose(seen["keys"], keys, atol=1e-6)
    assert torch.allclose(seen["values"], values, atol=1e-6)
    assert seen["keys"].shape[2] == (N + 1) + (N + 2) + (N + 1)
    # the row: 2 5 | tag 30 31, thumbnail | 6 | tag 30 31, thumbnail | 7; what follows a tile sees it
    assert layout.mask.sum() == 2 + (2 + N) + 1 + (2 + N) + 1
    visible = (seen["bias"][0, 0] == 0).sum(1).tolist()
    first, second = 2 * N + 3, 3 * N + 4
    assert visible == [0, 0] + [first] * (2 + N) + [first] + [second] * (2 + N) + [second]


@torch.no_grad()
def test_nvlm_h_needs_a_placeholder_for_each_tile():
    model, batch = built(H), tiled([2, 5, TWO, 6])
    one = rows_of([[2, 5, IMAGE, 6]])
    with pytest.raises(ValueError, match="one for each tile"):
        logits_of(model, batch.with_streams({"text": one}))
    text_logits(built(D), batch.with_streams({"text": one}))  # in the row, a picture may be one placeholder


@FORMS
@torch.no_grad()
def test_nvlm_nothing_sees_what_comes_later(fusion):
    model = built(fusion)
    batch = tiled([2, 5, TWO, 6, 7, [(0, 0), (1, 0), THUMBNAIL], 8, 9])
    (before,) = text_logits(model, batch)
    ids = [t for t in batch["text"].values[0].tolist() if t != IMAGE or fusion is X]
    if fusion is H:
        ids = [2, 5, 30, 31, 6, 7, 30, 31, 8, 9]
    for row in range(3, 6):
        (after,) = text_logits(model, changed(batch, row))
        second = ids.index(7) + 1
        assert torch.equal(before[:second], after[:second])
        assert not torch.allclose(before[-1], after[-1], atol=1e-6)
    (other,) = text_logits(model, tiled([2, 5, TWO, 6, 7, [(0, 0), (1, 0), THUMBNAIL], 8, 40]))
    assert torch.equal(before[:-1], other[:-1])


@FORMS
@torch.no_grad()
def test_nvlm_cached_equals_uncached_decoding(fusion):
    model = built(fusion)
    more = [[40, 41, 42], [43, 44, 45], [46, 47, 48], [49, 50, 51]]
    for side in ("left", "right"):
        batch = tiled(*ROWS, side=side)
        logits, cache = model.prefill(batch["text"], {"image": batch["image"]})
        steps = [logits]
        for place in range(3):
            logits, cache = model.advance(torch.tensor([row[place] for row in more]), cache)
            steps.append(logits)
        whole = text_logits(model, tiled(*[row + tail for row, tail in zip(ROWS, more)]))
        for row in range(4):
            assert torch.allclose(torch.stack(steps)[:, row], whole[row][-4:], atol=1e-5)
    index = torch.tensor([2, 0])
    _, cache = model.prefill(batch["text"], {"image": batch["image"]})
    kept, _ = model.advance(torch.tensor([40, 41]), cache.rows(index))
    wanted = text_logits(model, tiled(*[[*row, token] for row, token in zip(ROWS, [41, 1, 40, 1])]))
    assert torch.allclose(kept, torch.stack([wanted[2][-1], wanted[0][-1]]), atol=1e-5)


@FORMS
@torch.no_grad()
def test_nvlm_packed_documents_equal_rows(fusion):
    model = built(fusion)
    apart = tiled(*ROWS)
    joined = tiled([part for row in ROWS for part in row])
    segment = [number for number, row in enumerate(ROWS) for _ in row_of(row)[0]]
    text = replace(joined["text"], segment=torch.tensor([segment]))
    packed = joined.with_streams({"text": text, "image": replace(joined["image"], values=apart["image"].values)})
    (got,) = text_logits(model, packed)
    assert torch.allclose(got, torch.cat(text_logits(model, apart)), atol=1e-5)


@FORMS
def test_nvlm_recompute_gives_the_same_gradients(fusion):
    model = built(fusion).train()
    batch = tiled(*ROWS, side="left")
    gradients = []
    for on in (False, True):
        model.set_recompute(on)
        model.zero_grad()
        logits, layout = logits_of(model, batch)
        logits[layout.mask].logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5) for name in gradients[0])
    assert gradients[0]["connector.projection.weight"].any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="thumbnails"):
        answering(H)
    with pytest.raises(ValueError, match="thumbnails"):
        answering(H, tiler={"thumbnail": "none"})
    with pytest.raises(ValueError, match="no gated block would stand"):
        answering({"kind": "hybrid", "every": 5}, tiler={})
    with pytest.raises(ValueError, match='"hybrid"'):
        answering(H, tiler={}, tokens={"keep": {"layers": [1], "ratios": [0.5]}})
    assert (answering(H, tiler={}).picture_positions, answering(H, tiler={}).tiles_apart) == (N, True)
    assert (answering(X, tiler={}).picture_positions, answering(X, tiler={}).tiles_apart) == (None, False)
