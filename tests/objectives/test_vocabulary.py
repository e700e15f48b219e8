"""Positions, chunked log-probabilities and divergences, each against the formula written out in float64."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.objectives.toys import Expanding, logits_by_hand, mixed_batch
from vlm.config.errors import RunFailed
from vlm.objectives import vocabulary as shared
from vlm.types import Vocabulary
from vlm.types.layout import IGNORE, Modality

DIRECTIONS = ["forward", "reverse", "symmetric", "js", "tv", "skew"]


def view_of(seed=0, **changes):
    return Expanding(seed, **changes).encode(mixed_batch(), {"text": frozenset({"vocabulary"})})["text"]


def written_out(student, teacher, direction, temperature, mix):
    """One row of logits, id by id."""
    s = [math.exp(x / temperature) for x in student.tolist()]
    t = [math.exp(x / temperature) for x in teacher.tolist()]
    s, t = [x / sum(s) for x in s], [x / sum(t) for x in t]

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q))

    if direction == "forward":
        return kl(t, s)
    if direction == "reverse":
        return kl(s, t)
    if direction == "symmetric":
        return (1 - mix) * kl(t, s) + mix * kl(s, t)
    if direction == "js":
        middle = [(1 - mix) * b + mix * a for a, b in zip(s, t)]
        return (1 - mix) * kl(t, middle) + mix * kl(s, middle)
    if direction == "tv":
        return 0.5 * sum(abs(a - b) for a, b in zip(s, t))
    return kl(t, [mix * b + (1 - mix) * a for a, b in zip(s, t)])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_llava_kd_divergences_equal_their_sums(direction, temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(5, 7, dtype=torch.float64), 3 * torch.randn(5, 7, dtype=torch.float64)
    for mix in (None, 0.3):
        got = shared.divergence(student, teacher, direction=direction, temperature=temperature, mix=mix)
        share = {"symmetric": 0.9, "js": 0.9, "skew": 0.1}.get(direction, 0.0) if mix is None else mix
        expected = [written_out(s, t, direction, temperature, share) for s, t in zip(student, teacher)]
        assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
        assert (got > 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_llava_kd_divergences_of_equal_logits_are_0_with_gradient_0(direction):
    logits = (5 * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    values = shared.divergence(logits, logits.detach(), direction=direction)
    assert torch.allclose(values, torch.zeros_like(values), atol=1e-14)
    values.sum().backward()
    assert logits.grad.abs().max() < 1e-14


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_llava_kd_masked_and_padded_ids_are_left_out_and_stay_finite(direction):
    torch.manual_seed(2)
    student, teacher = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    expected = shared.divergence(student[:, [0, 2, 3]], teacher[:, [0, 2, 3]], direction=direction)
    student[:, 1], teacher[:, 4], student[:, 5], teacher[:, 5] = (-math.inf,) * 4
    student.requires_grad_()
    values = shared.divergence(student, teacher, direction=direction)
    assert torch.allclose(values, expected, atol=1e-12)
    values.sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad[:, [1, 4, 5]].abs().max() == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_llava_kd_divergence_gradients_are_the_slopes(direction):
    torch.manual_seed(3)
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: shared.divergence(x, teacher, direction=direction, temperature=1.7), (student,))


@pytest.mark.parametrize("chunk", [1, 80, 10**6])
def test_target_log_probabilities_equal_a_direct_log_softmax(chunk):
    view = view_of(softcap=3.0)
    scores, places = shared.target_log_probabilities(view, chunk=chunk)
    logs, expected, where = logits_by_hand(view).log_softmax(-1), [], []
    label, mask = view.layout.label, view.layout.mask
    for row in range(label.shape[0]):
        for t in range(1, label.shape[1]):
            if mask[row, t] and label[row, t] != IGNORE:
                expected.append(logs[row, t - 1, label[row, t]])
                where.append((row, t - 1))
    assert torch.allclose(scores, torch.stack(expected), atol=1e-12)
    assert list(zip(places.row.tolist(), places.position.tolist())) == where
    assert torch.equal(places.sample_index, view.layout.sample_index[places.row])


def test_chunks_change_no_gradient():
    grads = []
    for chunk in (40, 10**6):
        model = Expanding(bias=torch.randn(40, generator=torch.Generator().manual_seed(0)))
        view = model.encode(mixed_batch(), {"text": frozenset({"vocabulary"})})["text"]
        shared.target_log_probabilities(view, chunk=chunk)[0].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_chosen_ids_are_scored_beside_the_targets():
    view = view_of()
    ids, places = shared.argmax_tokens(view)
    logs = places.of(logits_by_hand(view).log_softmax(-1))
    assert torch.equal(ids, logs.argmax(-1))
    both, _ = shared.target_log_probabilities(view, chosen=ids[:, None])
    assert torch.allclose(both[:, 1], logs.max(-1).values, atol=1e-12)
    assert torch.allclose(both[:, 0], shared.target_log_probabilities(view)[0], atol=1e-12)
    small, _ = shared.argmax_tokens(view, size=5)
    assert torch.equal(small, logs[:, :5].argmax(-1))


def test_masked_targets_stand_at_their_own_place():
    view = view_of()
    scores, places = shared.target_log_probabilities(view, unit="masked")
    chosen = view.layout.label != IGNORE
    expected = logits_by_hand(view).log_softmax(-1)[chosen].gather(1, view.layout.label[chosen][:, None])[:, 0]
    assert torch.allclose(scores, expected, atol=1e-12)
    assert torch.equal(places.position, places.about)


def test_visual_positions_leave_out_the_last_of_each_picture():
    layout = view_of().layout
    visual, whole = shared.visual_of(layout), shared.visual_of(layout, leave_last=False)
    assert (whole.of(layout.modality) == Modality.IMAGE).all()
    assert torch.bincount(whole.of(layout.picture)).tolist() == [3, 3, 3, 3, 3]
    assert torch.bincount(visual.of(layout.picture)).tolist() == [2, 2, 2, 2, 2]
    follows = layout.modality[visual.row, visual.position + 1]
    assert (follows == Modality.IMAGE).all()
    single = shared.visual_of(view_of(positions=1).layout)
    assert len(single) == 5


def test_adjacent_pictures_are_told_apart():
    view = view_of()
    joined = view.layout.gather((view.layout.modality[2] == Modality.IMAGE).nonzero().flatten()[None].expand(5, -1))
    assert shared.visual_of(joined).position[shared.visual_of(joined).row == 2].tolist() == [0, 1, 3, 4]


def test_positions_that_do_not_agree_name_the_sample():
    first, second = (shared.targets_of(view_of().layout) for _ in range(2))
    shared.match(first, second, [f"k{i}" for i in range(5)], what="targets", names=("a", "b"))
    fewer = second[torch.arange(len(second)) != 6]
    with pytest.raises(RunFailed, match=r"k2: a has 3 targets where b has 2"):
        shared.match(first, fewer, [f"k{i}" for i in range(5)], what="targets", names=("a", "b"))
    none = second[second.row != 4]
    with pytest.raises(RunFailed, match=r"k4: a has 1 targets where b has 0"):
        shared.match(first, none, [f"k{i}" for i in range(5)], what="targets", names=("a", "b"))


def test_no_row_at_all_gives_empty_scores_with_a_gradient():
    view = view_of()
    hidden = view.vocabulary.hidden[:, 0][:0].requires_grad_()

    def both(logits):
        return logits.sum(-1), logits.argmax(-1)

    first, second = shared.in_chunks(both, [(view.vocabulary, hidden)])
    assert first.shape == second.shape == (0,)
    first.sum().backward()


def test_logits_are_not_kept_for_the_backward_pass():
    n, ids = 64, 997
    hidden = torch.randn(n, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(ids, 4, dtype=torch.float64, requires_grad=True)
    vocabulary, other = Vocabulary(hidden, weight), Vocabulary(hidden.detach() + 1, weight.detach())
    sizes = []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        values = shared.position_divergences((vocabulary, hidden), (other, other.hidden), chunk=7 * ids)
    assert sizes
    assert max(sizes) <= weight.numel() < n * ids
    values.sum().backward()
    assert weight.grad.abs().sum() > 0
