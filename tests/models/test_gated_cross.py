"""Gated cross-attention: with its gates at 0 the language model is itself, and what no picture precedes gets nothing."""

import torch

from tests.models.model_makers import answering, batch_of, logits_of, pictures_of, rows_of
from tests.models.picture_rows import COUNTS, CROSS, IMAGE, ROWS, built


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
