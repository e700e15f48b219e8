"""Distillation of vocabulary logits and of relations: the exact checks of llava-kd, in float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.objectives.toys import (
    CLOCK,
    Expanding,
    apply,
    batch_of,
    engine_of,
    gradients,
    logits_by_hand,
    loss_of,
    mixed_batch,
    pictures,
    tokens,
    view_of,
    views_of,
)
from vlm.config.errors import RunFailed
from vlm.objectives import BuildContext, DistillOptions
from vlm.objectives.relation import feature_relation, logit_gram, logit_relation
from vlm.objectives.vocabulary import divergence, visual_of
from vlm.types import Context, SingleProcess, Views, Vocabulary
from vlm.types.layout import IGNORE, Modality

DIRECTIONS = ["forward", "reverse", "symmetric", "js", "tv", "skew"]
RELATION = DistillOptions(target="relation")


def logits(**changes):
    return DistillOptions(target="logits", **changes)


def places(layout, at, leave_last=True):
    """(sample, row, position of the logits) of every position that counts, by plain loops."""
    out = []
    for row in range(layout.mask.shape[0]):
        sample, seen = int(layout.sample_index[row]), []
        for t in range(layout.mask.shape[1]):
            if not layout.mask[row, t]:
                continue
            if at == "all":
                out.append((sample, row, t))
            elif at == "answers" and t and layout.label[row, t] != IGNORE:
                out.append((sample, row, t - 1))
            elif at == "visual" and layout.modality[row, t] == Modality.IMAGE:
                seen.append(t)
        for t in seen:
            follows = [u for u in seen if u > t and layout.picture[row, u] == layout.picture[row, t]]
            if follows or not leave_last:
                out.append((sample, row, t))
    return out


def relation_by_loops(z, y):
    """1 - cosine of the two matrices of products, entry by entry."""
    dot = first = second = 0.0
    for p in range(len(z)):
        for q in range(len(z)):
            a, b = float((z[p] * z[q]).sum()), float((y[p] * y[q]).sum())
            dot, first, second = dot + a * b, first + a * a, second + b * b
    return 1 - dot / math.sqrt(first * second)


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("at", ["answers", "visual", "all"])
@pytest.mark.parametrize("leave_last", [True, False])
def test_llava_kd_logits_equal_the_divergence_position_by_position(at, per, leave_last):
    batch, student, teacher = mixed_batch(), Expanding(1), Expanding(2, width=5)
    last = {"leave_last": leave_last} if at == "visual" else {}
    _, terms = apply(logits(at=at, per=per, temperature=1.5, **last), batch, student, teacher=teacher)
    own, other = view_of(student, batch), view_of(teacher, batch)
    chosen = places(own.layout, at, leave_last)
    values = [
        divergence(logits_by_hand(own)[row, t][None], logits_by_hand(other)[row, t][None], temperature=1.5)[0]
        for _, row, t in chosen
    ]
    if per == "token":
        assert torch.allclose(terms.values, torch.stack(values), atol=1e-12)
        assert terms.sample_index.tolist() == [sample for sample, _, _ in chosen]
        return
    for sample in range(5):
        mine = [value for value, (s, _, _) in zip(values, chosen) if s == sample]
        assert terms.weights[sample] == bool(mine)
        assert not mine or torch.allclose(terms.values[sample], torch.stack(mine).mean(), atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("at", ["answers", "visual", "all"])
def test_llava_kd_identical_models_give_0(direction, at):
    model = Expanding(1)
    engine = engine_of(model, [logits(at=at, direction=direction)], teacher=Expanding(1))
    assert engine.update([mixed_batch()], CLOCK).loss == pytest.approx(0.0, abs=1e-14)
    assert max(float(grad.abs().max()) for grad in gradients(model).values()) < 1e-14


@pytest.mark.parametrize("source", ["logits", "hidden:0", "hidden:1"])
@pytest.mark.parametrize("vocab", [40, 1])
def test_llava_kd_identical_models_give_relation_0(source, vocab):
    model = Expanding(1, vocab=vocab)
    batch = mixed_batch() if vocab == 40 else batch_of(1, text=tokens([[1, 3, 0]], [1]), image=pictures([0]))
    engine = engine_of(model, [RELATION.model_copy(update={"source": source})], teacher=Expanding(1, vocab=vocab))
    assert engine.update([batch], CLOCK).loss == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("source", ["logits", "hidden:1"])
@pytest.mark.parametrize("vocab", [40, 2])
def test_llava_kd_relation_equals_the_double_loop(source, vocab):
    batch = mixed_batch()
    batch = batch.with_streams({"text": replace(batch["text"], supervised=batch["text"].mask & False)})
    student, teacher = Expanding(1, vocab=vocab, positions=5), Expanding(2, vocab=vocab, positions=5, width=3)
    _, terms = apply(RELATION.model_copy(update={"source": source}), batch, student, teacher=teacher)
    own, other = view_of(student, batch), view_of(teacher, batch)
    z, y = (logits_by_hand(view) if source == "logits" else view.hidden[1] for view in (own, other))
    z, y = z.detach(), y.detach()
    by_sample = [[] for _ in range(5)]
    for picture in range(5):
        mine = [(s, row, t) for s, row, t in places(own.layout, "visual") if own.layout.picture[row, t] == picture]
        rows = [row for _, row, _ in mine], [t for _, _, t in mine]
        assert len(mine) == 4
        by_sample[mine[0][0]].append(relation_by_loops(z[rows], y[rows]))
    assert terms.weights.tolist() == [1, 0, 1, 1, 1]
    expected = torch.tensor([sum(values) / max(1, len(values)) for values in by_sample], dtype=torch.float64)
    assert torch.allclose(terms.values, expected, atol=1e-12)
    assert (expected[0] > 1e-6) or vocab == 2


@pytest.mark.parametrize("size", [3, 50])
@pytest.mark.parametrize("chunk", [1, 64, 10**6])
def test_llava_kd_relation_is_the_same_in_slices_and_has_the_gradient_of_the_whole(size, chunk):
    torch.manual_seed(0)
    weight = torch.randn(size, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(size, dtype=torch.float64)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    other = Vocabulary(torch.randn(7, 6, dtype=torch.float64), torch.randn(size + 2, 6, dtype=torch.float64))
    own = Vocabulary(hidden, weight, bias, 5.0)
    value = logit_relation((own, hidden), (other, other.hidden), chunk=chunk)
    z, y = own.logits(), other.logits()[:, :size]
    a, b = z @ z.T, y @ y.T
    whole = 1 - (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    assert torch.allclose(value, whole, atol=1e-12)
    assert torch.allclose(logit_gram(own, hidden, size, chunk=chunk), a, atol=1e-12)
    for got, expected in zip(torch.autograd.grad(value, (hidden, weight)), torch.autograd.grad(whole, (hidden, weight))):
        assert torch.allclose(got, expected, atol=1e-12)


def test_llava_kd_relation_ignores_scale_and_rotation():
    torch.manual_seed(0)
    for width in (3, 11):
        z, y = torch.randn(6, width, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
        turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
        first = feature_relation(z, y)
        assert torch.allclose(feature_relation(z @ turn, y), first, atol=1e-12)
        assert torch.allclose(feature_relation(1e-3 * z, y), first, atol=1e-12)
    batch, student, teacher = mixed_batch(), Expanding(1), Expanding(2)
    _, first = apply(RELATION, batch, student, teacher=teacher)
    with torch.no_grad():
        student.head.mul_(37.0)
    _, second = apply(RELATION, batch, student, teacher=teacher)
    assert torch.allclose(first.values, second.values, atol=1e-12)


@pytest.mark.parametrize(("width", "form"), [(3, 3), (8, 7), (20, 7)])
def test_llava_kd_relation_makes_matrices_of_the_smaller_kind(width, form):
    """Products of positions with positions, [7, 7], or of channels with channels where those are fewer."""
    torch.manual_seed(0)
    z, y, shapes = torch.randn(7, width, requires_grad=True), torch.randn(7, width), set()
    with saved_tensors_hooks(lambda t: shapes.add(tuple(t.shape)) or t, lambda t: t):
        feature_relation(z, y)
    assert {shape for shape in shapes if len(shape) == 2 and shape[0] == shape[1]} == {(form, form)}


def test_llava_kd_relation_of_zero_logits_is_finite():
    hidden = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(9, 4, dtype=torch.float64)
    value = logit_relation((Vocabulary(hidden, weight), hidden), (Vocabulary(hidden + 1, weight), hidden.detach() + 1))
    assert float(value.detach()) == 1
    value.backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("options", [logits(at="visual"), RELATION], ids=["logits", "relation"])
def test_llava_kd_text_positions_leave_visual_terms_alone(options):
    batch, student, teacher = mixed_batch(), Expanding(1), Expanding(2)
    objective, terms = apply(options, batch, student, teacher=teacher)
    views = views_of(batch, objective.requires, model=student, teacher=teacher)
    changed = Views()
    for key, view in views.items():
        chosen = visual_of(view.layout)
        noise = torch.randn_like(view.vocabulary.hidden)
        noise[chosen.row, chosen.position] = 0
        label = torch.where(view.layout.label == IGNORE, IGNORE, 39 - view.layout.label)
        vocabulary = replace(view.vocabulary, hidden=view.vocabulary.hidden + noise)
        changed[key] = replace(view, vocabulary=vocabulary, layout=replace(view.layout, label=label))
    again = objective(changed, Context(batch, SingleProcess()))
    assert torch.equal(terms.values, again.values)
    _, answers = apply(logits(), batch, student, teacher=teacher)
    other = logits().build(BuildContext(student, {"teacher": teacher}))(changed, Context(batch, SingleProcess()))
    assert not torch.allclose(answers.values, other.values)


@pytest.mark.parametrize("options", [logits(at="visual"), RELATION], ids=["logits", "relation"])
def test_llava_kd_two_pictures_give_the_mean_of_the_single_losses(options):
    student, teacher = Expanding(1), Expanding(2)
    both = mixed_batch()
    singles = [float(loss_of(apply(options, both.samples(i, i + 1), student, teacher=teacher)[1]).detach()) for i in (0, 4)]
    chosen = torch.tensor([0, 4])
    text = replace(both["text"].rows(chosen), sample_index=torch.tensor([0, 1]))
    two = batch_of(2, text=text, image=replace(both["image"].rows(chosen), sample_index=torch.tensor([0, 1])))
    _, terms = apply(options, two, student, teacher=teacher)
    assert float(loss_of(terms).detach()) == pytest.approx(sum(singles) / 2, abs=1e-12)


@pytest.mark.parametrize("options", [logits(), logits(at="visual"), logits(at="all"), RELATION], ids=lambda o: f"{o.target}-{o.at}")
def test_llava_kd_the_teacher_gets_no_gradient(options):
    student, teacher = Expanding(1), Expanding(2)
    _, terms = apply(options, mixed_batch(), student, teacher=teacher)
    loss_of(terms).backward()
    assert sum(float(grad.abs().sum()) for grad in gradients(student).values()) > 0
    assert not gradients(teacher)
    hidden = RELATION.model_copy(update={"source": "hidden:1"})
    loss_of(apply(hidden, mixed_batch(), student, teacher=teacher)[1]).backward()
    assert not gradients(teacher)


@pytest.mark.parametrize("options", [logits(), logits(at="visual"), RELATION], ids=lambda o: f"{o.target}-{o.at}")
def test_llava_kd_vocabularies_of_other_padded_size_are_cut_to_the_shared_part(options):
    student, teacher = Expanding(1, vocab=40), Expanding(2, vocab=40)
    padded = copy.deepcopy(teacher)
    padded.head = torch.nn.Parameter(torch.cat([teacher.head.detach(), torch.full((6, 8), 9.0).double()]))
    _, first = apply(options, mixed_batch(), student, teacher=teacher)
    _, second = apply(options, mixed_batch(), student, teacher=padded)
    _, mirrored = apply(options, mixed_batch(), padded, teacher=student)
    _, plain = apply(options, mixed_batch(), teacher, teacher=student)
    assert torch.allclose(first.values, second.values, atol=1e-12)
    assert torch.allclose(mirrored.values, plain.values, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_llava_kd_masked_ids_stay_finite(direction):
    bias = torch.zeros(40, dtype=torch.float64)
    bias[[0, 33, 39]] = -math.inf
    for models in ((None, bias), (bias, None), (bias, bias)):
        student, teacher = (Expanding(seed, bias=b) for seed, b in zip((1, 2), models))
        for options in (logits(direction=direction), logits(at="visual", direction=direction), RELATION):
            _, terms = apply(options, mixed_batch(), student, teacher=teacher)
            assert terms.values.isfinite().all()
            student.zero_grad()
            loss_of(terms).backward()
            assert all(grad.isfinite().all() for grad in gradients(student).values())


@pytest.mark.parametrize("options", [logits(), logits(at="visual"), logits(at="all"), RELATION], ids=lambda o: f"{o.target}-{o.at}")
def test_llava_kd_no_logits_are_saved_for_the_backward_pass(options):
    """Neither [R, V] of the chosen positions nor more: the largest tensor kept is a weight or a hidden state."""
    vocab = 1009
    student, teacher = Expanding(1, vocab=vocab, positions=9), Expanding(2, vocab=vocab, positions=9)
    batch = mixed_batch()
    objective = options.build(BuildContext(student, {"teacher": teacher}))
    views = views_of(batch, objective.requires, model=student, teacher=teacher)
    sizes, shapes = [], []

    def note(tensor):
        sizes.append(tensor.numel())
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        terms = objective(views, Context(batch, SingleProcess()))
        loss = loss_of(terms)
    assert sizes
    assert not [shape for shape in shapes if vocab in shape and shape != (vocab, 8)]
    assert max(sizes) <= student.head.numel()
    loss.backward()
    assert student.head.grad.abs().sum() > 0


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("parts", [2, 5, 7])  # of seven, two hold no sample
def test_llava_kd_micro_batches_equal_one_batch(parts, per):
    entries = [
        logits(name="answers", per=per),
        logits(name="visual", at="visual", per=per),
        logits(name="all", at="all", per=per, direction="js"),
        RELATION.model_copy(update={"weight": 0.5}),
    ]
    model, again = Expanding(1), Expanding(1)
    first = engine_of(model, entries, teacher=Expanding(2)).update([mixed_batch()], CLOCK)
    second = engine_of(again, entries, teacher=Expanding(2)).update(mixed_batch().split(parts), CLOCK)
    assert first.losses == pytest.approx(second.losses, abs=1e-12)
    assert min(first.losses.values()) > 0
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, gradients(again)[name], atol=1e-12)


def test_llava_kd_text_alone_has_no_visual_term():
    rows = tokens([[1, 9, 10, 2], [1, 8, 2]], [2, 1])
    for batch in (batch_of(2, text=rows, image=pictures([])), batch_of(2, text=rows, image=pictures([])).samples(0, 1)):
        for options in (logits(at="visual"), logits(at="visual", per="token"), RELATION):
            _, terms = apply(options, batch, Expanding(1), teacher=Expanding(2))
            assert terms.weights.sum() == 0
            assert float(terms.total().detach()) == 0
    alone = batch_of(2, text=rows)
    assert float(RELATION.build(BuildContext(Expanding(), {"teacher": Expanding()})).count(alone)) == 0


def test_llava_kd_a_picture_of_one_position_keeps_it():
    for options in (logits(at="visual"), logits(at="visual", per="token"), RELATION):
        _, terms = apply(options, mixed_batch(), Expanding(1, positions=1), teacher=Expanding(2, positions=1))
        assert terms.weights.sum() > 0


def test_llava_kd_the_picture_stream_of_the_context_is_counted():
    batch = mixed_batch()
    fewer = batch["image.noisy"].rows(torch.tensor([0, 3, 4]))
    text = batch["text"].rows(torch.tensor([0, 1, 3, 4]))  # without the sample of two pictures
    batch = batch.with_streams({"image.noisy": fewer, "text": text})
    for options in (logits(at="visual", stream="text@image.noisy"), DistillOptions(target="relation", stream="text@image.noisy")):
        _, terms = apply(options, batch, Expanding(1), teacher=Expanding(2))
        assert terms.weights.tolist() == [1, 0, 0, 1, 1]
        _, clean = apply(options.model_copy(update={"stream": "text"}), batch, Expanding(1), teacher=Expanding(2))
        assert terms.weights.tolist() == clean.weights.tolist()


@pytest.mark.parametrize("options", [logits(at="visual"), logits(at="all"), RELATION], ids=lambda o: f"{o.target}-{o.at}")
def test_llava_kd_other_visual_positions_are_refused_by_the_sample(options):
    for changes, message in (({"positions": 4}, "k0: .* where"), ({"positions": 4, "kept": (0, 2, 3)}, "k0: .* different")):
        with pytest.raises(RunFailed, match=message):
            apply(options, mixed_batch(), Expanding(1), teacher=Expanding(2, **changes))


def test_llava_kd_answers_are_matched_beside_dropped_pictures():
    """A student that drops visual positions is still compared with the same answer tokens of its teacher."""
    batch, student, teacher = mixed_batch(), Expanding(1, kept=(1,)), Expanding(2)
    _, terms = apply(logits(per="token"), batch, student, teacher=teacher)
    own, other = view_of(student, batch), view_of(teacher, batch)
    pairs = zip(places(own.layout, "answers"), places(other.layout, "answers"), strict=True)
    expected = [
        divergence(logits_by_hand(own)[r, t][None], logits_by_hand(other)[q, u][None])[0] for (_, r, t), (_, q, u) in pairs
    ]
    assert torch.allclose(terms.values, torch.stack(expected), atol=1e-12)


def test_llava_kd_both_may_drop_the_same_positions():
    for options in (logits(at="visual"), logits(at="visual", per="token"), logits(at="all", per="token"), RELATION):
        _, terms = apply(options, mixed_batch(), Expanding(1, kept=(0, 2)), teacher=Expanding(2, kept=(0, 2)))
        assert terms.weights.sum() > 0


def test_different_targets_are_refused_by_the_sample():
    batch, student, teacher = mixed_batch(), Expanding(1), Expanding(2)
    objective = logits().build(BuildContext(student, {"teacher": teacher}))
    views = views_of(batch, objective.requires, model=student, teacher=teacher)
    label = views["teacher/text"].layout.label.clone()
    label[1, (label[1] != IGNORE).nonzero()[0]] += 1
    views["teacher/text"] = replace(views["teacher/text"], layout=replace(views["teacher/text"].layout, label=label))
    with pytest.raises(RunFailed, match="k1: model/text and teacher/text have different targets"):
        objective(views, Context(batch, SingleProcess()))


def test_a_model_without_visual_positions_is_refused():
    batch, student, teacher = mixed_batch(), Expanding(1, kept=()), Expanding(2, kept=())
    for options in (logits(at="visual"), RELATION):
        with pytest.raises(ValueError, match="k0 has a picture but no visual positions"):
            apply(options, batch, student, teacher=teacher)


def test_impossible_combinations_are_refused():
    model = Expanding()
    both = BuildContext(model, {"teacher": model})
    with pytest.raises(ValueError, match=r"\[companions.teacher\]"):
        logits().build(BuildContext(model))
    with pytest.raises(ValueError, match="both be logits or both hidden"):
        DistillOptions(target="relation", teacher_source="hidden:2").build(both)
    with pytest.raises(ValueError, match="source"):
        DistillOptions(target="relation", source="hidden:x")
    with pytest.raises(ValueError, match="mix"):
        logits(mix=1.0)


def test_llava_kd_relation_may_read_other_layers_of_the_teacher():
    options = DistillOptions(target="relation", source="hidden:0", teacher_source="hidden:1")
    objective, terms = apply(options, mixed_batch(), Expanding(1), teacher=Expanding(2))
    assert {str(request) for request in objective.requires} == {"model/text.hidden:0", "teacher/text.hidden:1"}
    assert terms.values[0] > 0


def test_masked_answers_are_read_at_their_own_place():
    batch, student, teacher = mixed_batch(), Expanding(1), Expanding(2)
    _, terms = apply(logits(unit="masked", per="token"), batch, student, teacher=teacher)
    own, other = view_of(student, batch), view_of(teacher, batch)
    chosen = own.layout.label != IGNORE
    expected = divergence(logits_by_hand(own)[chosen], logits_by_hand(other)[chosen])
    assert torch.allclose(terms.values, expected, atol=1e-12)
