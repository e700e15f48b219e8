"""Gradients of models that read pictures and answer: recomputed, in mixed precision, of the connector alone, and what they learn."""

from dataclasses import replace

import pytest
import torch

from tests.models.model_makers import answering, batch_of, logits_of, pictures_of, rows_of
from tests.models.picture_rows import BOTH, COUNTS, CROSS, IMAGE, PREFIX, ROWS, built
from vlm.types.batch import Role


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


@pytest.mark.parametrize("kind", ["prefix", "cross", "dropping"])
def test_autocast_trains(kind):
    tokens = {"keep": {"layers": [1, 2], "ratios": [0.5, 0.25]}} if kind == "dropping" else None
    model = built(CROSS if kind == "cross" else PREFIX, tokens=tokens).train()
    text = rows_of(ROWS, side="left", role=[[int(Role.INSTRUCTION)] * len(row) for row in ROWS])
    batch = batch_of(4, text=text, image=pictures_of(COUNTS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, layout = logits_of(model, batch)
    narrow.float()[layout.mask].logsumexp(-1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.connector.projection.weight.grad.any()
    if kind != "dropping":  # which positions stay may turn on the last bits
        wide, _ = logits_of(model, batch)
        assert (narrow - wide)[layout.mask].abs().max() < 0.15


@pytest.mark.parametrize("kind", ["prefix", "cross", "dropping"])
def test_it_learns_to_name_what_it_sees(kind):
    """Four plain colours, four answers: chance is 1 in 4, and the text alone says nothing."""
    tokens = {"keep": {"layers": [1], "ratios": [0.5]}} if kind == "dropping" else None
    model = answering(CROSS if kind == "cross" else PREFIX, tokens=tokens, shake=0.0).train()
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    values = colours[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    pictures = replace(pictures_of([1, 1, 1, 1]), values=values)
    prompts, answers = [[2, IMAGE, 5]] * 4, [10, 11, 12, 13]
    roles = [[int(Role.INSTRUCTION)] * 3 + [int(Role.ANSWER)]] * 4
    batch = batch_of(4, text=rows_of([[*p, a] for p, a in zip(prompts, answers)], role=roles), image=pictures)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits, layout = logits_of(model, batch)
        last = layout.mask.sum(1) - 2
        loss = torch.nn.functional.cross_entropy(logits[torch.arange(4), last], torch.tensor(answers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model.prefill(rows_of(prompts), {"image": pictures})[0].argmax(-1).tolist() == answers
