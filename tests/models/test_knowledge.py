"""Knowledge of a text: triples beside it, in the dual encoder."""

import math

import numpy as np
import pytest
import torch

from vlm.config.errors import RequestError
from vlm.data.streams.graphs import with_triples
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.encoder import of_memory, open_model
from vlm.layers import normalise
from vlm.models import DualEncoderOptions, load_model, save_model
from vlm.models.directory import published_layout
from vlm.models.knowledge import KnowledgeEncoder, KnowledgeOptions, triple_vectors
from vlm.models.towers import TextOptions
from vlm.types import Batch, TokenIds, VocabularyLayout

TEXTS = ["a red circle left of a blue square", "on the left", "a small star above a large green ring", "a red circle"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe([*TEXTS, "colour 0 1 2 3"] * 3, 320)


def model_of(tokenizer, weight=0.2, seed=0, **knowledge):
    torch.manual_seed(seed)
    table = {
        "embed_dim": 12,
        "vision": {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8},
        "text": {"width": 16, "depth": 1, "heads": 2, "length": 16},
    }
    if weight is not None:
        table["knowledge"] = {"weight": weight, "layers": 2, **knowledge}
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return DualEncoderOptions.model_validate(table).build(VocabularyLayout.of_text(tokenizer.vocab_size, special))


def stream_of(tokenizer, texts=TEXTS, triples=(6, 5)):
    ids, mask = tokenizer.encode(list(texts), 16)
    plain = TokenIds(torch.from_numpy(ids), torch.from_numpy(mask), torch.arange(len(texts)))
    return plain if triples is None else with_triples(plain, texts, tokenizer, *triples)


def encoded(model, stream):
    zeros = torch.zeros(len(stream), dtype=torch.int64)
    return model.encode(Batch({"text": stream}, ["k"] * len(stream), zeros, zeros), {"text": frozenset({"embedding"})})["text"]


def encoder(seed=0, **options):
    torch.manual_seed(seed)
    text = TextOptions(width=16, depth=1, heads=2, length=16)
    return KnowledgeEncoder(KnowledgeOptions(layers=2, **options), text, 10)


def test_structure_clip_weight_0_leaves_the_text_bit_for_bit(tokenizer):
    out = encoded(model_of(tokenizer, 0.0), stream_of(tokenizer))
    assert torch.equal(out.embedding, out.statistics["plain"])
    without = model_of(tokenizer, None)
    model = model_of(tokenizer, 0.0)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("knowledge.")})
    assert torch.equal(encoded(without, stream_of(tokenizer)).embedding, out.embedding)


def test_structure_clip_embedding_is_the_unit_text_with_a_share_of_its_unit_knowledge(tokenizer):
    model, stream = model_of(tokenizer, 0.3), stream_of(tokenizer)
    out = encoded(model, stream)
    known = model.knowledge(model.text.tokens(stream.triples), stream.triple_mask)
    torch.testing.assert_close(known.norm(dim=1)[[0, 2, 3]], torch.ones(3))
    expected = normalise(out.statistics["plain"]) + 0.3 * known
    torch.testing.assert_close(normalise(out.embedding), normalise(expected))


def test_structure_clip_without_triples_knowledge_is_0_and_finite_with_its_gradient(tokenizer):
    model, stream = model_of(tokenizer), stream_of(tokenizer)
    assert not stream.triple_mask[1].any()
    out = encoded(model, stream)
    assert torch.equal(out.embedding[1], out.statistics["plain"][1])
    out.embedding.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.knowledge.first.grad is not None
    plain = encoded(model, stream_of(tokenizer, triples=None))
    assert not plain.statistics
    torch.testing.assert_close(plain.embedding, out.statistics["plain"])


def test_structure_clip_a_triple_is_h_plus_r_minus_t_of_masked_means():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(3, 4, 3, 5, 8, generator=generator)
    lengths = torch.randint(0, 6, (3, 4, 3), generator=generator)
    mask = torch.arange(5) < lengths[..., None]
    mask[2] = False
    expected = torch.zeros(3, 4, 8, dtype=torch.float64)
    for n, k, part in np.ndindex(3, 4, 3):
        own = tokens[n, k, part][mask[n, k, part]].double()
        if len(own):
            expected[n, k] += own.mean(0) * (-1 if part == 2 else 1)
    got, valid = triple_vectors(torch.where(mask[..., None], tokens, torch.nan), mask)  # what is masked is never read
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    assert valid.tolist() == (lengths.sum(2) > 0).logical_and(torch.tensor([True, True, False])[:, None]).tolist()


def test_padding_more_triples_and_their_order_change_nothing():
    made = encoder()
    tokens, mask = torch.randn(2, 3, 3, 4, 16), torch.ones(2, 3, 3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    known = made(tokens, mask)
    assert known.shape == (2, 10)
    longer = torch.cat([tokens, torch.full((2, 2, 3, 4, 16), torch.nan)], 1), torch.cat([mask, torch.zeros(2, 2, 3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(made(*longer), known)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(made(tokens[:, order], mask[:, order]), known)
    swapped_ends = tokens[:, :, [2, 1, 0]]  # horse rides astronaut
    assert (made(swapped_ends, mask[:, :, [2, 1, 0]]) - known).abs().max() > 1e-3
    assert made(tokens[:0], mask[:0]).shape == (0, 10)


def test_a_directory_keeps_knowledge_and_evaluation_parses_each_text_itself(tokenizer, tmp_path):
    model = model_of(tokenizer)
    assert published_layout(model) is None
    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    again = load_model(tmp_path)
    assert again.options.knowledge == model.options.knowledge
    assert again.triples == (6, 5)
    rows = open_model(tmp_path, threads=1).encode_text(TEXTS)
    with torch.no_grad():
        expected = normalise(encoded(model.eval(), stream_of(tokenizer)).embedding).numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    one = of_memory(model, tokenizer, model.preprocess()).encode_text(TEXTS[:1])
    np.testing.assert_allclose(one, rows[:1], atol=1e-6)


def test_a_bundle_is_refused_and_parts_name_the_text(tokenizer):
    with pytest.raises(RequestError, match="knowledge has no bundle"):
        model_of(tokenizer).export_parts()
    assert model_of(tokenizer, None).options.text_part == "text"
    plain, model = model_of(tokenizer, None, seed=1), model_of(tokenizer)
    model.take_part("text", plain)
    assert torch.equal(model.text.tokens.weight, plain.text.tokens.weight)
    assert math.isclose(model.options.knowledge.weight, 0.2)
