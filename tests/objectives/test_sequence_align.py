"""Alignment of interleaved sequences: slices, similarities by every monotone way, gradients over micro-batches."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from tests.objectives.toys import CLOCK, Expanding, batch_of, engine_of, gradients, pictures, tokens
from tests.ops.test_alignment import ways
from vlm.config.errors import RunFailed
from vlm.config.options import Options
from vlm.models import Model
from vlm.objectives import BuildContext, SequenceAlignOptions
from vlm.objectives.sequence_align import sequence_similarity
from vlm.objectives.slices import slices_of
from vlm.types import Context, Outputs, SingleProcess, Views


class Width(Options):
    width: int = 8


class Embedding(Model):
    """A frozen teacher: pictures by a linear map, texts by the mean of their tokens."""

    kind = "toy"
    offers = {"pictures": frozenset({"embedding"}), "tokens": frozenset({"embedding"})}

    def __init__(self, seed, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.options = Options()
        self.see, self.read = nn.Linear(12, width), nn.Embedding(40, width)
        self.double().requires_grad_(False)

    def encode(self, batch, wanted):
        out = {}
        for name in wanted:
            rows = batch[name]
            if rows.values.is_floating_point():
                x, live = self.see(rows.values.double().flatten(1)), rows.mask
            else:
                x = (self.read(rows.values) * rows.mask[..., None]).sum(1)
                live = rows.mask.any(1)
            out[name] = Outputs(rows.sample_index, live, embedding=x)
        return out


ROWS = [[1, 3, 9, 10, 2], [1, 7, 8, 2], [1, 11, 12, 3, 13, 3, 14, 2], [1, 3, 15, 3, 16, 17, 2]]
ANSWERS = [3, 3, 7, 6]
TEXTS = [([9, 10, 2], 0), ([7, 8, 2], 1), ([11, 12], 2), ([13], 2), ([14, 2], 2), ([15], 3), ([16, 17, 2], 3)]
KINDS = ["pt", "t", "tptpt", "ptpt"]


def interleaved():
    words = tokens([ids for ids, _ in TEXTS], [0] * len(TEXTS), [sample for _, sample in TEXTS])
    return batch_of(4, text=tokens(ROWS, ANSWERS), image=pictures([0, 2, 2, 3, 3]), slices=words)


def model_of(seed=0):
    model = Expanding(seed)
    model.options = Width()
    return model


def options_of(**changes):
    return SequenceAlignOptions(**{"layer": 1, "sigma": 0.5, "dim": 5, **changes})


def prepared(objective, model, batch, **companions):
    views = Views({"model/text": model.encode(batch, {"text": frozenset({"hidden:1"})})["text"]})
    for name, companion in companions.items():
        for stream, outputs in companion.encode(batch, {"image": {"embedding"}, "slices": {"embedding"}}).items():
            views[f"{name}/{stream}"] = outputs
    return objective.prepare(views, Context(batch, SingleProcess()))


def test_sugar_slices_are_pictures_and_the_texts_between_them():
    model, batch = model_of(), interleaved()
    view = model.encode(batch, {"text": frozenset({"hidden:1"})})["text"]
    slices = slices_of(view.layout)
    found = ["".join("p" if v else "t" for v, m in zip(*row) if m) for row in zip(slices.visual.tolist(), slices.mask.tolist())]
    assert found == KINDS
    read = slices.read.double() @ view.hidden[1]
    for row in range(4):
        layout = view.layout
        own = view.hidden[1][row]
        for k in range(len(KINDS[row])):
            if KINDS[row][k] == "p":  # the mean over its positions
                expected = own[layout.picture[row] == slices.source[row, k]].mean(0)
                assert torch.allclose(read[row, k], expected, atol=1e-6)
    # The last position of a text: here that of the last token of the row.
    last = view.layout.mask.sum(1) - 1
    for row in range(4):
        assert torch.allclose(read[row, len(KINDS[row]) - 1], view.hidden[1][row, last[row]], atol=1e-6)


def by_every_way(cosine, kernel, sigma, gamma):
    """The strength of one alignment, over all ways."""
    if kernel == "gak":
        k = ((cosine - 1) / sigma).exp()
        k = k / (2 - k)
        return math.log(sum(math.prod(float(k[i, j]) for i, j in way) for way in ways(*k.shape)))
    costs = [sum(1 - float(cosine[i, j]) for i, j in way) for way in ways(*cosine.shape)]
    least = min(costs) if kernel == "dtw" else -gamma * math.log(sum(math.exp(-c / gamma) for c in costs))
    return -least / sigma


@pytest.mark.parametrize("kernel", ["gak", "soft-dtw", "dtw"])
def test_sugar_values_are_squared_differences_of_similarities_over_every_way(kernel):
    model, teacher, batch = model_of(), Embedding(3), interleaved()
    options = options_of(kernel=kernel, calibrate=False)
    objective = options.build(BuildContext(model, {"teacher": teacher})).double()
    views = prepared(objective, model, batch, teacher=teacher)
    terms = objective(views, Context(batch, SingleProcess()))

    def similarities(vectors):
        cosines = torch.nn.functional.normalize(vectors.detach().double(), dim=-1)
        lengths = [len(kinds) for kinds in KINDS]

        def strength(a, b):
            return by_every_way(cosines[a, : lengths[a]] @ cosines[b, : lengths[b]].T, kernel, options.sigma, options.gamma)

        return {
            (a, b): math.exp((strength(a, b) - 0.5 * (strength(a, a) + strength(b, b))) / max(lengths[a], lengths[b]))
            for a, b in combinations(range(4), 2)
        }

    said = views["model/text"].tokens
    projected = torch.where(said[..., -1:] > 0, objective.project["visual"](said[..., :-1]), objective.project["text"](said[..., :-1]))
    predicted, target = similarities(projected), similarities(views["teacher/text"].tokens)
    errors = {pair: (predicted[pair] - target[pair]) ** 2 for pair in predicted}
    expected = [sum(e for pair, e in errors.items() if sample in pair) / 3 for sample in range(4)]
    assert torch.allclose(terms.values.double(), torch.tensor(expected).double(), atol=1e-5)
    assert terms.weights.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kernel", ["gak", "soft-dtw", "dtw"])
def test_sugar_similarity_of_a_sequence_with_itself_is_one_and_symmetric(kernel):
    vectors = torch.nn.functional.normalize(torch.randn(3, 4, 6, dtype=torch.float64), dim=-1)
    vectors = torch.cat([vectors, vectors[:1]])
    cosine = torch.einsum("akd,bld->akbl", vectors, vectors)
    lengths = torch.tensor([4, 3, 2, 4])
    first, second = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([3, 1, 0, 2, 1])
    values = sequence_similarity(cosine, lengths, first, second, kernel=kernel)
    assert values[0] == pytest.approx(1)
    assert values[1] == pytest.approx(float(values[2]))
    assert values[3] == pytest.approx(float(values[4]))
    assert (values <= 1 + 1e-9).all() or kernel != "gak"


def test_sugar_single_slices_have_the_kernel_as_similarity():
    cosine = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)[:, None, :, None]
    one = torch.ones(2, dtype=torch.int64)
    value = sequence_similarity(cosine, one, torch.tensor([0]), torch.tensor([1]), sigma=0.5, positive_definite=False)
    assert value.item() == pytest.approx(math.exp((0.3 - 1) / 0.5))


def test_sugar_triple_kernel_takes_each_block_from_its_own_teacher_and_calibrates():
    model, batch = model_of(), interleaved()
    companions = {"joint": Embedding(3), "see": Embedding(4, 7), "read": Embedding(5, 9)}
    options = options_of(teacher="joint", image_teacher="see", text_teacher="read")
    objective = options.build(BuildContext(model, companions)).double()
    assert {str(r) for r in objective.requires} == {
        "model/text.hidden:1", "joint/image.embedding", "joint/slices.embedding", "see/image.embedding", "read/slices.embedding",
    }  # fmt: skip
    views = prepared(objective, model, batch, **companions)
    mask, visual = views["model/text"].token_mask, views["model/text"].tokens[..., -1] > 0
    cosine = objective._taught(views, mask.any(1), mask, visual)
    own = torch.nn.functional.normalize(companions["see"].encode(batch, {"image": {"embedding"}})["image"].embedding.float(), dim=1)
    found = cosine[0, 0, 2, [1, 3]]  # the picture of sample 0 with both of sample 2
    raw = own[0] @ own[[1, 2]].T
    ratio = (1 - found) / (1 - raw)
    assert ratio[0].item() == pytest.approx(ratio[1].item(), rel=1e-4)
    used = mask[:, :, None, None] & mask[None, None]
    used = used & ~torch.eye(mask.numel(), dtype=torch.bool).view(used.shape)
    left, right = visual[:, :, None, None], visual[None, None]
    means = [float((1 - cosine)[used & block].mean()) for block in (left & right, ~left & ~right, left != right)]
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    assert means[0] == pytest.approx(means[2], rel=1e-4)


def test_sugar_targets_carry_no_gradient_and_micro_batches_do_not_matter():
    batch = interleaved()
    found = []
    for parts in ([range(4)], [range(2), range(2, 4)]):
        model, teacher = model_of(), Embedding(3)
        torch.manual_seed(7)
        engine = engine_of(model, [options_of()], teacher=teacher)
        engine.update([select(batch, list(part)) for part in parts], CLOCK)
        assert not gradients(teacher)
        found.append({**gradients(model), **{f"own.{k}": v for k, v in gradients(engine.objectives[0].objective).items()}})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("own.project.visual") for name in found[0])
    assert {"embed.weight", "see.weight"} <= found[0].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-7), name
        assert gradient.isfinite().all()


def select(batch, samples):
    """The part of `interleaved` with these samples."""
    texts = [(ids, samples.index(sample)) for ids, sample in TEXTS if sample in samples]
    seen = [i for i, sample in enumerate([0, 2, 2, 3, 3]) if sample in samples]
    rows = pictures([0, 2, 2, 3, 3])
    own = torch.tensor([samples.index([0, 2, 2, 3, 3][i]) for i in seen], dtype=torch.int64)
    return batch_of(
        len(samples),
        text=tokens([ROWS[s] for s in samples], [ANSWERS[s] for s in samples]),
        image=type(rows)(rows.values[seen], rows.mask[seen], own),
        slices=tokens([ids for ids, _ in texts], [0] * len(texts), [sample for _, sample in texts]),
    )


def test_texts_that_do_not_match_the_slices_name_the_sample():
    model, teacher, batch = model_of(), Embedding(3), interleaved()
    objective = options_of().build(BuildContext(model, {"teacher": teacher})).double()
    fewer = batch.with_streams({"slices": tokens([[7]], [0], [1])})
    with pytest.raises(RunFailed, match=r"k0: teacher/slices has 0 texts where the row has 1"):
        prepared(objective, model, fewer, teacher=teacher)
    with pytest.raises(ValueError, match=r"needs \[companions.teacher\]"):
        options_of().build(BuildContext(model))


def test_one_sample_alone_has_nothing_to_match():
    model, teacher = model_of(), Embedding(3)
    batch = select(interleaved(), [2])
    objective = options_of().build(BuildContext(model, {"teacher": teacher})).double()
    terms = objective(prepared(objective, model, batch, teacher=teacher), Context(batch, SingleProcess()))
    assert terms.values.tolist() == [0]
