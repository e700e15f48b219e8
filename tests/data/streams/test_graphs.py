"""Streams from scene graphs: captions made wrong, and texts with their triples."""

import pytest
import torch
from pydantic import ValidationError

from vlm.data.loader import build_loader, open_split
from vlm.data.options import DataOptions
from vlm.data.scene_graph import parse
from vlm.data.scene_swap import swaps
from vlm.data.streams.graphs import with_triples
from vlm.data.texts import source_texts
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.preprocess import Preprocess
from vlm.types import TokenIds

TABLE = {
    "source": "scenes:?n=48",
    "columns": {"text": "captions"},
    "captions": {"kind": "several", "k": 3},
    "streams": {"text.negative": {"kind": "scene-graph-swap"}},
}


def options(**changes):
    return DataOptions.model_validate(TABLE | changes)


@pytest.fixture(scope="module")
def tokenizer():
    table = options()
    return Tokenizer.train_bpe(source_texts(open_split(table, "train"), table), 500)


def batches(tokenizer, count=2, table=None, **settings):
    loader = build_loader(table or options(), tokenizer=tokenizer, preprocess=Preprocess(8), batch_size=8, **settings)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_each_wrong_caption_is_an_exchange_of_the_caption_of_its_sample_and_slot(tokenizer):
    [batch, _] = batches(tokenizer)
    texts, wrong = batch["text"], batch["text.negative"]
    said = {
        (int(sample), int(slot)): tokenizer.decode(ids[mask])
        for sample, slot, ids, mask in zip(texts.sample_index, texts.slot, texts.values, texts.mask)
    }
    made = {
        (int(sample), int(slot)): tokenizer.decode(ids[mask])
        for sample, slot, ids, mask in zip(wrong.sample_index, wrong.slot, wrong.values, wrong.mask)
    }
    assert {place for place, text in said.items() if swaps(text)} == set(made)
    assert 0 < len(made) < len(said)  # a caption with nothing to exchange has no row
    for place, text in made.items():
        assert text in {one.text for one in swaps(said[place])}


def test_draws_depend_on_seed_and_epoch_and_not_on_workers(tokenizer):
    def rows(**settings):
        seed = settings.pop("seed", 0)
        found = {}
        for batch in batches(tokenizer, 12, seed=seed, **settings):
            stream = batch["text.negative"]
            for row, sample in enumerate(stream.sample_index.tolist()):
                key = batch.keys[sample], int(batch.epoch[sample]), int(stream.slot[row])
                found[key] = tuple(stream.values[row].tolist())
        return found

    assert rows() == rows(table=options(workers=1))
    assert rows() != rows(seed=1)
    epochs = {epoch for _, epoch, _ in rows()}
    assert len(epochs) == 2


def test_triples_of_a_text_are_the_tokens_of_its_graph(tokenizer):
    texts = ["a red circle left of a blue square", "nothing", "the orange triangle above the black arrow"]
    ids, mask = tokenizer.encode(texts, 16)
    plain = TokenIds(torch.from_numpy(ids), torch.from_numpy(mask), torch.arange(3))
    stream = with_triples(plain, texts, tokenizer, 2, 3)
    assert stream.triples.shape == stream.triple_mask.shape == (3, 2, 3, 3)
    assert not stream.triple_mask[1].any()
    for row in (0, 2):
        for k, triple in enumerate(parse(texts[row]).triples[:2]):
            for part, words in enumerate(triple):
                own = tokenizer.ids([words], add_special=False)[0][:3]
                assert stream.triples[row, k, part][stream.triple_mask[row, k, part]].tolist() == own
    assert torch.equal(stream.rows(torch.tensor([2])).triples, stream.triples[2:])


def test_a_batch_has_triples_only_for_a_model_that_reads_them(tokenizer):
    [with_them, _], [without, _] = batches(tokenizer, triples=(4, 5)), batches(tokenizer)
    assert without["text"].triples is None
    assert with_them["text"].triples.shape[1:] == (4, 3, 5)
    assert with_them["text.negative"].triples is None
    assert with_them["text"].triple_mask.any()
    assert torch.equal(with_them["text"].values, without["text"].values)
    [one, two] = with_them.split(2)
    assert torch.equal(torch.cat([one["text"].triples, two["text"].triples]), with_them["text"].triples)


@pytest.mark.parametrize("name", ["text", "image.wrong", "group"])
def test_a_name_that_means_something_else_is_refused(name):
    with pytest.raises(ValidationError, match="captions made wrong"):
        options(streams={name: {"kind": "scene-graph-swap"}})


def test_captions_are_needed():
    with pytest.raises(ValidationError, match="no captions"):
        options(packer={"kind": "document"}, captions={"kind": "one"})
