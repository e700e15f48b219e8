"""Pictures cut into tiles by the data: rows, slots, places, ids; packing counts them; generation writes the same ids."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.talk_makers import IMAGE_ID, TOKENIZER, loader_of
from tests.models.model_makers import TOWER, shaken
from vlm.config.errors import DataError
from vlm.evaluation.generator import TorchGenerator, pictures_of
from vlm.models import VisionLanguageOptions
from vlm.runtime.chat import Message
from vlm.runtime.pieces import PieceIds
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.templates import TEMPLATES
from vlm.runtime.tiling import THUMBNAIL, Tiling, positions
from vlm.types import Role, VocabularyLayout

SIDE = 16
SIZES = [(32, 16), (16, 48), (10, 10), (48, 32), (33, 30)]
STREAMS = {"text": {"kind": "conversation", "text_only": True}}
PRE = Preprocess(SIDE, "squash")
VOCABULARY = VocabularyLayout.of_text(
    TOKENIZER.vocab_size,
    {"pad": TOKENIZER.pad_id, "eos": TOKENIZER.eos_id, "bos": TOKENIZER.bos_id, "image": IMAGE_ID},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    entries = []
    for number in range(15):  # none, one or two pictures
        names = [f"{(number + k) % 5}.png" for k in range(number % 3)]
        asked = "<image>\n" * len(names) + f"what is thing {number}?"
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"a thing number {number}"}]
        entries.append({"id": number, "conversations": said, **({"image": names} if names else {})})
    (folder / "talks.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def number_of(key):
    """The entry that a key names by its line."""
    return int(key.rsplit(":")[-1]) - 1


def names_of(key):
    """The pictures of a sample, in order."""
    return [(number_of(key) + k) % 5 for k in range(number_of(key) % 3)]


def tiled(folder, tiling, **rest):
    rest = {"picture_positions": 4, "preprocess": PRE, "text": {"length": 400}, "batch_size": 15} | rest
    return loader_of(str(folder / "talks.jsonl"), STREAMS, tiling=tiling, **rest)


def generator_of(tiler, template="plain", fusion=None):
    torch.manual_seed(0)
    options = VisionLanguageOptions.model_validate(
        dict(
            towers={"main": TOWER},
            connector={"kind": "linear"},
            language=dict(width=16, depth=2, heads=2, kv_heads=2, ffn_width=24, length=400),
            fusion=fusion or {"kind": "prefix"},
            tiler=tiler,
            template=template,
            length=400,
        )
    )
    return TorchGenerator(options.build(VOCABULARY).eval(), TOKENIZER, TEMPLATES[template])


def picture_of(folder, number):
    return Image.open(folder / f"{number}.png").convert("RGB")


@pytest.mark.parametrize("style", ["none", "text-1d", "text-2d", "text-bbox"])
@pytest.mark.parametrize("thumbnail", ["none", "first", "last"])
def test_rows_slots_and_places(folder, style, thumbnail):
    tiling = Tiling(SIDE, 6, thumbnail=thumbnail, tags=style)
    with tiled(folder, tiling) as loader:
        batch = next(loader)
    image, text = batch["image"], batch["text"]
    for sample, key in enumerate(batch.keys):
        mine = image.rows(image.sample_index == sample)
        at = 0
        for slot, number in enumerate(names_of(key)):
            cut = tiling.cut(picture_of(folder, number))
            for piece, _ in cut:
                assert torch.equal(mine.values[at], torch.from_numpy(PRE.to_array(piece.picture)))
                assert (int(mine.slot[at]), mine.place[at].tolist()) == (slot, [0, *piece.place])
                at += 1
        assert at == len(mine)
        assert int((text.values[sample] == IMAGE_ID).sum()) == len(mine)


def test_nvlm_tokens_of_a_picture_are_pieces_times_tokens_and_tag(folder):
    """(n + 1) * (N + len(tag)) where tags are equally long; one place the sum of each."""
    ids_of = PieceIds(TOKENIZER._core, (IMAGE_ID,))
    visual = 4
    with tiled(folder, Tiling(SIDE, 6), picture_positions=visual) as loader:
        batch, encode = next(loader), loader._plan.encoder
    assert encode is not None
    for sample, key in enumerate(batch.keys):
        names = names_of(key)
        grids = [Tiling(SIDE, 6).grid(*SIZES[number]) for number in names]
        tags = [tag for number in names for _, tag in Tiling(SIDE, 6).cut(picture_of(folder, number))]
        row, mask = batch["text"].values[sample], batch["text"].mask[sample]
        marked = batch["text"].role[sample] == int(Role.TAG)
        assert row[marked].tolist() == [i for tag in tags for i in ids_of(tag)]
        total = int(marked.sum()) + visual * int((row[mask] == IMAGE_ID).sum())
        assert total == sum(visual + len(ids_of(tag)) for tag in tags)
        own = [
            positions(grid, visual, 0) + sum(len(ids_of(t)) for _, t in Tiling(SIDE, 6).cut(picture_of(folder, n)))
            for grid, n in zip(grids, names)
        ]
        assert total == sum(own)
    lengths = {len(ids_of(f"<tile_{k}>")) for k in range(1, 7)}
    assert len(lengths) == 1
    (length,) = lengths
    for grid in ((2, 1), (1, 3), (3, 2)):
        n = grid[0] * grid[1]
        own = [f"<tile_{k}>" for k in range(1, n + 1)]
        assert positions(grid, visual, length, "none") == sum(visual + len(ids_of(tag)) for tag in own)
        assert positions(grid, visual, length) == (n + 1) * (visual + length)


@pytest.mark.parametrize("template", ["plain", "vicuna", "chatml"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_nvlm_the_prompt_is_the_row_of_training_up_to_the_answer(folder, template, wrapped):
    tiler = {"before": "<Image>", "after": "</Image>"} if wrapped else {}
    generator = generator_of(tiler, template)
    assert generator.model.preprocesses() == {"image": Preprocess(SIDE, "squash")}
    with tiled(folder, generator.model.tiling, template=TEMPLATES[template]) as loader:
        batch = next(loader)
    text, image = batch["text"], batch["image"]
    for sample, key in enumerate(batch.keys):
        pictures = [generator.prepare_image(picture_of(folder, number)) for number in names_of(key)]
        prompt = generator.prompt([Message("user", (f"what is thing {number_of(key)}?",))], pictures)
        row, role = text.values[sample][text.mask[sample]], text.role[sample][text.mask[sample]]
        first = int((role == int(Role.ANSWER)).nonzero()[0, 0])
        assert row[:first].tolist() == list(prompt.ids)
        assert (role[:first] == int(Role.TAG)).nonzero()[:, 0].tolist() == sorted(prompt.tags)
        if not pictures:
            assert not prompt.pictures
            continue
        shown, mine = pictures_of([prompt])["image"], image.rows(image.sample_index == sample)
        assert torch.equal(shown.values, mine.values)
        assert torch.equal(shown.slot, mine.slot)
        assert torch.equal(shown.place, mine.place)
        assert generator.positions(prompt) == len(prompt.ids) + len(mine) * 3


def test_the_row_that_generation_reads_is_as_long_as_the_model_makes_it(folder):
    for fusion in ({"kind": "prefix"}, {"kind": "cross-attention", "every": 1}, {"kind": "hybrid", "every": 1}):
        generator = generator_of({}, fusion=fusion)
        pictures = [generator.prepare_image(picture_of(folder, number)) for number in (0, 2)]
        prompt = generator.prompt([Message("user", ("what is this?",))], pictures)
        stepper = generator.stepper()
        stepper.start([prompt])
        assert generator.positions(prompt) == int(stepper._cache.layers[0].mask.sum()), fusion


@pytest.mark.parametrize("kind", ["prefix", "cross-attention", "hybrid"])
@torch.no_grad()
def test_nvlm_generation_reads_what_training_reads(folder, kind):
    """The logits after a prompt are those of the row of training before its answer; so are the answer's bits."""
    generator = generator_of({}, fusion={"kind": kind} | ({} if kind == "prefix" else {"every": 1}))
    model = shaken(generator.model)  # opens the gates too
    with tiled(folder, model.tiling) as loader:
        batch = next(loader)
    output = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"]
    logits, layout = output.vocabulary.logits(), output.layout
    chosen = [row for row, key in enumerate(batch.keys) if names_of(key)][:4]
    prompts, answers = [], []
    for row in chosen:
        pictures = [generator.prepare_image(picture_of(folder, number)) for number in names_of(batch.keys[row])]
        number = number_of(batch.keys[row])
        prompts.append(generator.prompt([Message("user", (f"what is thing {number}?",))], pictures))
        answers.append(f"a thing number {number}")
    started = generator.stepper().start(prompts)
    nats = generator.nats(prompts, answers)
    for at, row in enumerate(chosen):
        first = int((layout.role[row] == int(Role.ANSWER)).nonzero()[0, 0])
        np.testing.assert_allclose(started[at], logits[row, first - 1].numpy(), atol=1e-4)
        own = layout.role[row, 1:] == int(Role.ANSWER)
        expected = -logits[row, :-1].log_softmax(-1).gather(1, layout.label[row, 1:].clamp(min=0)[:, None])[own, 0]
        np.testing.assert_allclose(nats[at], expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("fusion", ["prefix", "hybrid"])
def test_packed_rows_count_tags_and_tiles(folder, fusion):
    tiler = None if fusion == "prefix" else {}
    model = generator_of(tiler or {}, fusion={"kind": fusion} | ({"every": 1} if fusion == "hybrid" else {})).model
    rest = {"picture_positions": 4, "preprocess": PRE, "tiles_apart": model.tiles_apart}
    with tiled(folder, model.tiling, **rest) as loader:
        assert len(next(loader)) == 15  # none is too long
    length = 150
    with tiled(folder, model.tiling, packer={"kind": "document", "length": length}, batch_size=3, **rest) as loader:
        rows = [loader._next_row() for _ in range(3)]
        batch = loader._batch(rows)
        following = loader._waiting
    output = model.eval().encode(batch, {"text": frozenset({"vocabulary"})})["text"]
    assert output.layout.mask.sum(1).tolist() == [row.positions for row in rows]
    assert all(row.positions <= length for row in rows)
    assert rows[-1].positions + following.encoded["text"].positions > length
    assert max(len(row.rows) for row in rows) > 1
    image = batch["image"]
    for row, packed in enumerate(rows):
        mine = image.rows(image.sample_index == row)
        slots, first = [], 0
        for sample in packed.rows:
            own = [picture for picture, _, _ in sample.decoded.places]
            slots += [first + picture for picture in own]
            first += len(set(own))
        assert mine.slot.tolist() == slots


def test_a_stage_may_read_each_picture_as_one_tile(folder):
    with tiled(folder, Tiling(SIDE, 6), image={"tiles": False}) as loader:
        batch = next(loader)
    assert {tuple(place) for place in batch["image"].place.tolist()} == {(0, *THUMBNAIL)}
    assert len(batch["image"]) == sum(len(names_of(key)) for key in batch.keys)


def test_workers_give_the_same(folder):
    batches = []
    for workers in (0, 2):
        with tiled(folder, Tiling(SIDE, 6), workers=workers, image={"flip": True}) as loader:
            batches.append(next(loader))
    for name in ("image", "text"):
        for field in ("values", "slot", "place", "role"):
            one, two = (getattr(batch[name], field, None) for batch in batches)
            assert (one is None and two is None) or torch.equal(one, two)


def test_a_mirrored_picture_is_mirrored_whole(folder):
    tiling = Tiling(SIDE, 6)
    seen = set()
    with tiled(folder, tiling, image={"flip": True}) as loader:
        for _ in range(3):
            batch = next(loader)
            for sample, key in enumerate(batch.keys):
                if not names_of(key):
                    continue
                picture = picture_of(folder, names_of(key)[0])
                mine = batch["image"].rows((batch["image"].sample_index == sample) & (batch["image"].slot == 0))
                for mirrored in (False, True):
                    shown = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
                    pieces = np.stack([PRE.to_array(piece.picture) for piece, _ in tiling.cut(shown)])
                    if torch.equal(mine.values, torch.from_numpy(pieces)):
                        seen.add(mirrored)
                        break
                else:
                    raise AssertionError(key)
    assert seen == {False, True}


def test_what_cannot_be_cut_is_refused(folder):
    with pytest.raises(DataError, match="random crop"):
        tiled(folder, Tiling(SIDE, 6), image={"augment": "random-resized-crop"})
    large = {"preprocess": Preprocess(32, "squash"), "max_pixels": 48 * 32}
    with tiled(folder, Tiling(32, 6), **large, bad_samples={"budget": 1.0}) as loader:
        next(loader)
        assert loader.report()["reasons"]["too_many_pictures"] > 0
    generator = generator_of({})
    plain = {"image": np.zeros((3, SIDE, SIDE), np.uint8)}
    with pytest.raises(ValueError, match="must come from prepare_image"):
        generator.prompt([Message("user", ("what?",))], [plain])
