"""The cosine head over texts of classes against brute force. Sources: coop, dclip."""

import pytest
import torch
import torch.nn.functional as F

from vlm.objectives.classification import CosineHead

OWNER = torch.tensor([0, 0, 2, 1, 2, 2])


def rows(count, seed):
    return F.normalize(torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_hand(x, texts, owner, reduce):
    out = torch.empty(len(x), 3, dtype=x.dtype)
    for c in range(3):
        own = texts[owner == c]
        scores = x @ own.T
        mean = own.mean(0)
        out[:, c] = {"score-mean": scores.mean(1), "score-max": scores.amax(1), "embedding-mean": x @ (mean / mean.norm())}[reduce]
    return out


@pytest.mark.parametrize("reduce", ["score-mean", "score-max", "embedding-mean"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_scores_of_several_texts_by_hand(reduce, count):
    x, texts = rows(count, 0), rows(6, 1)
    head = CosineHead(reduce=reduce)
    torch.testing.assert_close(head.cosines(x, texts, OWNER, 3), by_hand(x, texts, OWNER, reduce))


@pytest.mark.parametrize("reduce", ["score-mean", "score-max", "embedding-mean"])
def test_gradients_by_differences(reduce):
    x, texts = rows(3, 0).requires_grad_(), rows(6, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: CosineHead(reduce=reduce).cosines(a, b, OWNER, 3), (x, texts))


def test_dclip_one_text_makes_all_reductions_equal_and_more_of_the_same_change_nothing():
    x, texts = rows(4, 0), rows(3, 1)
    one = [CosineHead(reduce=reduce).cosines(x, texts, torch.arange(3), 3) for reduce in ("score-mean", "score-max", "embedding-mean")]
    again = torch.cat([texts, texts[:1], texts[:1]])
    for reduce, scores in zip(("score-mean", "score-max", "embedding-mean"), one):
        torch.testing.assert_close(scores, x @ texts.T)
        torch.testing.assert_close(CosineHead(reduce=reduce).cosines(x, again, torch.tensor([0, 1, 2, 0, 0]), 3), scores)
