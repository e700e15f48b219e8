"""Where the sigmoid loss starts, and what it is divided by. Source: core-siglip."""

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.test_contrastive import encoder, pairs
from vlm.objectives import BuildContext, ContrastiveOptions
from vlm.types import Context, SingleProcess, Views


def test_core_siglip_starts_at_a_scale_of_10_and_a_bias_of_minus_10_and_is_divided_by_rows_not_by_pairs():
    model, batch = encoder(), pairs(7)
    objective = ContrastiveOptions(form="sigmoid", temperature="own").build(BuildContext(model))
    assert objective.log_scale.exp().item() == pytest.approx(10.0)
    assert objective.own_bias.item() == -10.0
    views = {request.key: model.encode(batch, {request.key: frozenset({request.wanted})})[request.key] for request in objective.requires}
    terms = objective(Views({f"model/{key}": view for key, view in views.items()}), Context(batch, SingleProcess()))
    image, text = (F.normalize(views[key].embedding, dim=1) for key in ("image", "text"))
    logits = 10.0 * image @ text.T - 10.0
    expected = -F.logsigmoid(logits * (2 * torch.eye(7) - 1)).sum() / 7
    torch.testing.assert_close(terms.total() / terms.weights.sum(), expected, atol=1e-5, rtol=1e-5)
