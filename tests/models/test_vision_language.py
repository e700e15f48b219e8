"""Models that read pictures and answer: where visual tokens go, what each position may see, cached decoding."""

from dataclasses import replace
from itertools import chain

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
    random_rows,
    rows_of,
    shaken,
)
from vlm.config.errors import CheckpointError, RequestError
from vlm.models import DualEncoderOptions, VisionLanguageOptions
from vlm.types import TokenIds, VocabularyLayout
from vlm.types.batch import Role
from vlm.types.layout import IGNORE, Modality

IMAGE = 3
PREFIX, CROSS = {"kind": "prefix"}, {"kind": "cross-attention", "every": 2}
BOTH = pytest.mark.parametrize("fusion", [PREFIX, CROSS], ids=["prefix", "cross"])
# one picture in the middle, none, two, one at the very start
ROWS = [[2, 5, IMAGE, 6, 7], [2, 8, 9], [2, IMAGE, 10, IMAGE, 11, 12], [IMAGE, 13]]
COUNTS = [1, 0, 2, 1]


def open_gates(model):
    with torch.no_grad():
        for block in model.cross.values():
            block.attention_gate.fill_(0.8)
            block.ffn_gate.fill_(-0.6)
    return model


def built(fusion, **changes):
    return open_gates(answering(fusion, **changes))


def expanded(model, rows, features):
    """The sequences that the prefix form must read, built position by position: [S_i, C] a row."""
    embedding, taken = model.language.tokens.weight, iter(features)
    out = []
    for row in rows:
        parts = [next(taken) if token == IMAGE else embedding[token][None] for token in row]
        out.append(torch.cat(parts))
    return out


def visual(model, pictures):
    norm = model.pixel_norms["main"](pictures.values)
    return model.visual_tokens({"main": norm})[0]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prefix_equals_the_row_built_by_hand(side):
    model, pictures = built(PREFIX), pictures_of(COUNTS)
    logits, layout = logits_of(model, batch_of(4, text=rows_of(ROWS, side=side, extra=2), image=pictures))
    sequences = expanded(model, ROWS, visual(model, pictures))
    for row, x in enumerate(sequences):
        hidden, _ = model.language.trunk(x[None], causal=True)
        expected = model.language.post_norm(hidden)[0] @ model.language.head_weight.T
        assert layout.mask[row].sum() == len(x)
        assert torch.allclose(logits[row, layout.mask[row]], expected, atol=1e-5)


@torch.no_grad()
def test_the_layout_says_what_every_position_is():
    roles = [[int(Role.INSTRUCTION)] * (len(row) - 1) + [int(Role.ANSWER)] for row in ROWS]
    supervised = [[0] * (len(row) - 1) + [1] for row in ROWS]
    text = rows_of(ROWS, role=roles, supervised=supervised, side="left")
    _, layout = logits_of(built(PREFIX), batch_of(4, text=text, image=pictures_of(COUNTS)))
    number = -1
    for row, tokens in enumerate(ROWS):
        expected = []
        for token, role, counted in zip(tokens, roles[row], supervised[row]):
            number += token == IMAGE
            image = (int(Modality.IMAGE), role, IGNORE, number)
            expected += [image] * 4 if token == IMAGE else [(int(Modality.TEXT), role, token if counted else IGNORE, -1)]
        size = len(expected)
        columns = torch.stack([layout.modality, layout.role, layout.label, layout.picture])[:, row, :size].T.tolist()
        assert [tuple(column) for column in columns] == expected
        assert layout.mask[row].tolist() == [place < size for place in range(layout.mask.shape[1])]
        assert layout.position[row, :size].tolist() == list(range(size))
        assert layout.kept[row].tolist() == list(range(layout.mask.shape[1]))
        assert layout.segment[row].tolist() == [0 if place < size else -1 for place in range(layout.mask.shape[1])]
        assert set(layout.label[row, size:].tolist()) <= {IGNORE}
        assert set(layout.picture[row, size:].tolist()) <= {-1}


@BOTH
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    together = {}
    for side in ("left", "right"):
        logits, layout = logits_of(model, batch_of(4, text=rows_of(ROWS, side=side, extra=3), image=pictures))
        together[side] = [logits[row, layout.mask[row]] for row in range(4)]
    for row, tokens in enumerate(ROWS):
        mine = pictures.rows(pictures.sample_index == row)
        mine = replace(mine, sample_index=torch.zeros(len(mine), dtype=torch.int64))
        alone, _ = logits_of(model, batch_of(1, text=rows_of([tokens]), image=mine))
        for side in together:
            assert torch.allclose(together[side][row], alone[0], atol=1e-5)


@BOTH
@torch.no_grad()
def test_packed_documents_equal_rows(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    joined = list(chain(*ROWS))
    segment = torch.tensor([[*chain(*([number] * len(row) for number, row in enumerate(ROWS))), -1]])
    text = replace(rows_of([joined], extra=1), segment=segment)
    one = replace(pictures, sample_index=pictures.sample_index * 0, slot=torch.arange(len(pictures)))
    packed, packed_layout = logits_of(model, batch_of(1, text=text, image=one))
    apart, layout = logits_of(model, batch_of(4, text=rows_of(ROWS), image=pictures))
    expected = torch.cat([apart[row, layout.mask[row]] for row in range(4)])
    assert torch.allclose(packed[0, packed_layout.mask[0]], expected, atol=1e-5)


@BOTH
@torch.no_grad()
def test_nothing_sees_what_comes_later(fusion):
    model, pictures = built(fusion), pictures_of([2])
    row = [2, 5, IMAGE, 6, 7, IMAGE, 8, 9, 10]
    logits, layout = logits_of(model, batch_of(1, text=rows_of([row]), image=pictures))
    changed_text, _ = logits_of(model, batch_of(1, text=rows_of([[*row[:-2], 20, 21]]), image=pictures))
    first = int((layout.label[0] == 9).nonzero())
    assert torch.equal(logits[0, :first], changed_text[0, :first])
    assert not torch.equal(logits[0, first], changed_text[0, first])
    second = replace(pictures, values=torch.stack([pictures.values[0], 1 - pictures.values[1]]))
    changed_picture, _ = logits_of(model, batch_of(1, text=rows_of([row]), image=second))
    before = int((layout.label[0] == 7).nonzero()) + 1
    assert torch.equal(logits[0, :before], changed_picture[0, :before])
    assert not torch.allclose(logits[0, -1], changed_picture[0, -1])
    # the placeholder stands where its picture begins: from there on the second picture is seen
    assert not torch.allclose(logits[0, before], changed_picture[0, before])


@BOTH
@torch.no_grad()
def test_cached_equals_uncached_decoding(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    more = random_rows([5] * 4, seed=3)
    for side in ("left", "right"):
        logits, cache = model.prefill(rows_of(ROWS, side=side), {"image": pictures})
        steps = [logits]
        for place in range(5):
            logits, cache = model.advance(torch.tensor([row[place] for row in more]), cache)
            steps.append(logits)
        whole, layout = logits_of(model, batch_of(4, text=rows_of([a + b for a, b in zip(ROWS, more)]), image=pictures))
        for row in range(4):
            assert torch.allclose(torch.stack(steps)[:, row], whole[row, layout.mask[row]][-6:], atol=1e-5)


@BOTH
@torch.no_grad()
def test_rows_of_a_cache_keep_their_pictures(fusion):
    model, pictures = built(fusion), pictures_of(COUNTS)
    _, cache = model.prefill(rows_of(ROWS), {"image": pictures})
    index = torch.tensor([2, 2, 0])
    logits, _ = model.advance(torch.tensor([20, 21, 22]), cache.rows(index))
    for row, (source, token) in enumerate(zip(index.tolist(), (20, 21, 22))):
        mine = pictures.rows(pictures.sample_index == source)
        mine = replace(mine, sample_index=mine.sample_index * 0)
        whole, _ = logits_of(model, batch_of(1, text=rows_of([ROWS[source] + [token]]), image=mine))
        assert torch.allclose(logits[row], whole[0, -1], atol=1e-5)


@torch.no_grad()
def test_nvlm_x_gates_at_zero_equal_the_language_model_bit_for_bit():
    model = answering(CROSS)
    for block in model.cross.values():
        block.attention_gate.zero_()
        block.ffn_gate.zero_()
    text = rows_of(ROWS)
    logits, layout = logits_of(model, batch_of(4, text=text, image=pictures_of(COUNTS)))
    plain = model.language.encode(batch_of(4, text=text), {"text": frozenset({"vocabulary"})})["text"]
    assert torch.equal(logits, plain.vocabulary.logits())
    assert torch.equal(layout.mask, plain.layout.mask)


def test_nvlm_x_fresh_gates_are_zero_and_have_a_gradient():
    model = answering(CROSS, shake=0.0)
    assert [int(layer) for layer in model.cross] == [2, 4]
    assert all(not b.attention_gate.any() and not b.ffn_gate.any() for b in model.cross.values())
    logits, layout = logits_of(model, batch_of(4, text=rows_of(ROWS), image=pictures_of(COUNTS)))
    logits[layout.mask].logsumexp(-1).sum().backward()
    for block in model.cross.values():
        assert block.attention_gate.grad.abs() > 1e-6
        assert block.ffn_gate.grad.abs() > 1e-6


def test_nvlm_x_positions_without_pictures_get_exactly_nothing():
    model = built(CROSS)
    text = rows_of(ROWS, side="left", extra=1)
    logits, _ = logits_of(model, batch_of(4, text=text, image=pictures_of(COUNTS)))
    plain = model.language.encode(batch_of(4, text=text), {"text": frozenset({"vocabulary"})})["text"].vocabulary.logits()
    # row 1 has no picture at all; rows 0 and 2 have text before their first one
    seen = torch.zeros_like(text.mask)
    for row, tokens in enumerate(ROWS):
        if IMAGE in tokens:
            seen[row, text.mask.shape[1] - len(tokens) + tokens.index(IMAGE) :] = True
    assert torch.equal(logits[~seen & text.mask], plain[~seen & text.mask])
    assert not torch.isclose(logits[seen], plain[seen], atol=1e-6).all(-1).any()
    logits[~seen & text.mask].sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("cross.", "connector.", "towers.")):
            assert parameter.grad is None or not parameter.grad.any(), name


def test_nvlm_x_rows_of_text_alone_skip_the_blocks():
    model = built(CROSS)
    for parameter in model.cross.parameters():
        parameter.data.fill_(torch.nan)
    rows = [row for row in ROWS if IMAGE not in row]
    logits, _ = logits_of(model, batch_of(1, text=rows_of(rows), image=pictures_of([0])))
    assert torch.isfinite(logits).all()
    assert torch.isfinite(logits_of(model, batch_of(1, text=rows_of(rows)))[0]).all()


@BOTH
def test_recompute_gives_the_same_gradients(fusion):
    model = built(fusion).train()
    batch = batch_of(4, text=rows_of(ROWS, side="left"), image=pictures_of(COUNTS))
    gradients = []
    for on in (False, True):
        model.set_recompute(on)
        model.zero_grad()
        logits, layout = logits_of(model, batch)
        logits[layout.mask].logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5) for name in gradients[0])
    assert any(name.startswith("towers.main.trunk.blocks.0") for name in gradients[0])


def test_limber_trainable_parameters_are_d_v_times_d_plus_d():
    model = answering(PREFIX)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("connector."))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 12 * 16 + 16
    logits, layout = logits_of(model, batch_of(4, text=rows_of(ROWS), image=pictures_of(COUNTS)))
    logits[layout.mask].logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable)
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


@torch.no_grad()
def test_the_context_names_the_pictures_and_each_stream_is_encoded_once():
    model = built(PREFIX)
    clean, noisy = pictures_of(COUNTS), pictures_of(COUNTS, seed=9)
    preferred, rejected = rows_of(ROWS), rows_of([[*row, 30] for row in ROWS])
    batch = batch_of(4, answer__preferred=preferred, answer__rejected=rejected, image=clean, image__noisy=noisy)
    calls = []
    model.connector.register_forward_hook(lambda *_: calls.append(1))
    fields = frozenset({"vocabulary"})
    out = model.encode(
        batch, {"answer.preferred": fields, "answer.rejected": fields, "answer.preferred@image.noisy": fields}
    )
    assert len(calls) == 2
    for key, text, pictures in (
        ("answer.preferred", preferred, clean),
        ("answer.rejected", rejected, clean),
        ("answer.preferred@image.noisy", preferred, noisy),
    ):
        alone, _ = logits_of(model, batch_of(4, text=text, image=pictures))
        assert torch.equal(out[key].vocabulary.logits(), alone)
        assert out[key].sample_index.tolist() == [0, 1, 2, 3]
    assert not torch.allclose(
        out["answer.preferred"].vocabulary.logits(), out["answer.preferred@image.noisy"].vocabulary.logits(), atol=1e-3
    )
    with pytest.raises(KeyError, match="no stream 'image.blurred'"):
        model.encode(batch, {"answer.preferred@image.blurred": fields})


@torch.no_grad()
def test_several_texts_of_a_sample_share_its_pictures():
    model, pictures = built(PREFIX), pictures_of([2, 1])
    rows = [[2, IMAGE, 5, IMAGE, 6], [IMAGE, IMAGE, 7], [2, IMAGE, 8]]
    text = replace(rows_of(rows), sample_index=torch.tensor([0, 0, 1]), slot=torch.tensor([0, 1, 0]))
    logits, layout = logits_of(model, batch_of(2, text=text, image=pictures))
    assert layout.picture.max() == 2
    assert sorted(set(layout.picture[1].tolist())) == [-1, 0, 1]
    for row, sample in enumerate((0, 0, 1)):
        mine = pictures.rows(pictures.sample_index == sample)
        mine = replace(mine, sample_index=mine.sample_index * 0)
        alone, own = logits_of(model, batch_of(1, text=rows_of([rows[row]]), image=mine))
        assert torch.allclose(logits[row, layout.mask[row]], alone[0, own.mask[0]], atol=1e-5)


@torch.no_grad()
def test_rows_of_pictures_may_stand_in_any_order_and_be_tiles():
    model, pictures = built(PREFIX), pictures_of([2, 1])
    text = rows_of([[2, IMAGE, 5, IMAGE], [IMAGE, 6]])
    logits, _ = logits_of(model, batch_of(2, text=text, image=pictures))
    turned = pictures.rows(torch.tensor([2, 1, 0]))
    again, other = logits_of(model, batch_of(2, text=text, image=turned))
    assert torch.equal(logits, again)
    assert other.picture[0, other.modality[0] == 1].tolist() == [2] * 4 + [1] * 4
    # two tiles of one picture: one placeholder takes both, or each has its own
    place = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]])
    tiles = replace(pictures, slot=torch.zeros(3, dtype=torch.int64), place=place)
    one, own = logits_of(model, batch_of(2, text=rows_of([[2, IMAGE, 5], [IMAGE, 6]]), image=tiles))
    assert own.picture[0, own.modality[0] == 1].tolist() == [0] * 4 + [1] * 4
    per_tile, _ = logits_of(model, batch_of(2, text=text, image=tiles))
    assert torch.equal(per_tile, logits)
    assert torch.equal(one[0, :9], logits_of(model, batch_of(1, text=rows_of([[2, IMAGE, IMAGE]]),
                                                             image=tiles.rows(torch.tensor([0, 1]))))[0][0])


@BOTH
def test_placeholders_that_do_not_fit_the_pictures_name_the_sample(fusion):
    model = built(fusion)
    with pytest.raises(ValueError, match=r"'sample 1': 2 picture placeholders in 'text', 1 pictures in 'image'"):
        logits_of(model, batch_of(2, text=rows_of([[2, 5], [IMAGE, IMAGE]]), image=pictures_of([0, 1])))
    with pytest.raises(ValueError, match=r"'sample 0': 0 picture placeholders in 'text', 1 pictures"):
        logits_of(model, batch_of(1, text=rows_of([[2, 5]]), image=pictures_of([1])))
    with pytest.raises(ValueError, match=r"'sample 0': 1 picture placeholders in 'text', 0 pictures"):
        logits_of(model, batch_of(1, text=rows_of([[IMAGE]])))
    with pytest.raises(ValueError, match="'prompt 0': 1 picture placeholders"):
        model.prefill(rows_of([[IMAGE]]), {})


@BOTH
@torch.no_grad()
def test_rows_may_be_empty_or_none(fusion):
    model = built(fusion)
    logits, layout = logits_of(model, batch_of(2, text=rows_of([[], [IMAGE]]), image=pictures_of([0, 1])))
    assert torch.isfinite(logits).all()
    assert not layout.mask[0].any()
    none = TokenIds(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
    assert logits_of(model, batch_of(0, text=none, image=pictures_of([])))[0].shape[0] == 0


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


def test_what_it_offers():
    model = answering(PREFIX)
    assert model.options.special_tokens == ("<image>",)
    assert (model.options.text_part, model.takes_context, model.options.text_length) == ("language", True, 64)
    assert (model.picture_positions, answering(CROSS).picture_positions) == (4, None)
    out = model.encode(
        batch_of(4, text=rows_of(ROWS), image=pictures_of(COUNTS)), {"text": frozenset({"hidden:0", "hidden:3", "statistics"})}
    )["text"]
    assert sorted(out.hidden) == [0, 3]
    assert out.hidden[3].shape[:2] == out.layout.mask.shape
    assert out.vocabulary is None
    assert out.statistics["kept_share"].tolist() == [1, 1, 1, 1]
    assert out.layout_of(3) is out.layout
