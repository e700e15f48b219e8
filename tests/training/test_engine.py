"""An update's gradients do not depend on how the global batch is cut into ranks and micro-batches."""

import threading

import pytest
import torch

from vlm.models import DualEncoderOptions, LanguageOptions
from vlm.objectives import BuildContext, ContrastiveOptions, DistillOptions, TokenCrossEntropyOptions
from vlm.objectives.base import Objective
from vlm.training.companions import Companion, Companions
from vlm.training.engine import Clock, Engine, Weighted
from vlm.types import Batch, Labels, Pictures, SingleProcess, Terms, TokenIds, VocabularyLayout

VOCABULARY = VocabularyLayout.of_text(50, {"bos": 1, "eos": 2 + 1, "pad": 0})
ENCODER = {
    "embed_dim": 16,
    "vision": {"width": 24, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8},
    "text": {"width": 24, "depth": 1, "heads": 2, "length": 9},
}


class Threads:
    """A communicator over threads of one process."""

    def __init__(self, size):
        self.size = size
        self.slots = [None] * size
        self.gate = threading.Barrier(size)

    def member(self, rank):
        group = self

        class Member:
            def exchange(self, value):
                group.slots[rank] = value
                group.gate.wait()
                out = list(group.slots)
                group.gate.wait()
                return out

            def sum(self, tensor):
                return torch.stack(self.exchange(tensor.detach().clone())).sum(0)

            def gather_rows(self, tensor):
                parts = [p.detach() for p in self.exchange(tensor)]
                parts[rank] = tensor
                return parts

            def gather_numbers(self, numbers):
                return self.exchange(list(numbers))

            def barrier(self):
                self.exchange(None)

        member = Member()
        member.rank, member.size = rank, group.size
        return member


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return DualEncoderOptions.model_validate(ENCODER | changes).build(VOCABULARY).double()


def pairs(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (n, 9), generator=generator)
    mask = torch.ones(n, 9, dtype=torch.bool)
    for row in range(n):
        stop = 2 + row % 7
        ids[row, stop], ids[row, stop + 1 :], mask[row, stop + 1 :] = 3, 0, False
    index = torch.arange(n)
    ones = torch.ones(n, dtype=torch.bool)
    streams = {
        "image": Pictures(torch.rand(n, 3, 16, 16, generator=generator), ones, index),
        "text": TokenIds(ids, mask, index),
        "group": Labels(torch.randint(0, n // 2 + 1, (n,), generator=generator), ones, index),
    }
    return Batch(streams, [f"k{i}" for i in range(n)], index, index * 0)


def gradients(engine):
    return [p.grad.clone() for p in engine.parameters() if p.grad is not None]


def engine_of(model, options, communicator=None, companions=None):
    companions = companions or Companions()
    context = BuildContext(model, companions.models())
    torch.manual_seed(5)
    entries = [Weighted(o.name, o.build(context).double(), o.weight) for o in options]
    return Engine(model, entries, companions, communicator or SingleProcess(), seed=0)


CONTRASTIVE = [
    [ContrastiveOptions()],
    [ContrastiveOptions(targets="groups")],
    [ContrastiveOptions(form="sigmoid", temperature="own")],
    [ContrastiveOptions(weight=0.5), ContrastiveOptions(name="second", temperature=0.1)],
]


@pytest.mark.parametrize("options", CONTRASTIVE, ids=["diagonal", "groups", "sigmoid-own", "two"])
@pytest.mark.parametrize("parts", [2, 3])
def test_core_infonce_gradient_caching_equals_the_whole_batch(options, parts):
    batch, clock = pairs(7), Clock(0, 10)
    whole, cut = engine_of(encoder(), options), engine_of(encoder(), options)
    first, second = whole.update([batch], clock), cut.update(batch.split(parts), clock)
    assert first.loss == pytest.approx(second.loss, abs=1e-10)
    for a, b in zip(gradients(whole), gradients(cut), strict=True):
        assert torch.allclose(a, b, atol=1e-6)  # embeddings are normalised in float32


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", CONTRASTIVE, ids=["diagonal", "groups", "sigmoid-own", "two"])
def test_ranks_with_uneven_shares_equal_one_process(options, ranks):
    batch, clock = pairs(8), Clock(0, 10)
    alone = engine_of(encoder(), options)
    expected = alone.update([batch], clock)
    group, results = Threads(ranks), [None] * ranks
    bounds = [0, 5, 8] if ranks == 2 else [0, 3, 4, 8]
    engines = [engine_of(encoder(), options, group.member(rank)) for rank in range(ranks)]

    def work(rank):
        share = batch.samples(bounds[rank], bounds[rank + 1])
        results[rank] = engines[rank].update(share.split(1), clock)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(ranks):
        assert results[rank].loss == pytest.approx(expected.loss, abs=1e-9)
        for a, b in zip(gradients(alone), gradients(engines[rank]), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_sample_scope_divides_by_the_weight_of_the_whole_update():
    torch.manual_seed(0)
    options = LanguageOptions(width=16, depth=1, heads=2, ffn_width=24, length=9)
    objective = [TokenCrossEntropyOptions(), TokenCrossEntropyOptions(name="smoothed", smoothing=0.1, z_loss=1e-3, weight=0.3)]
    batch, clock = pairs(7), Clock(3, 10)

    def run(parts):
        torch.manual_seed(1)
        engine = engine_of(options.build(VOCABULARY).double(), objective)
        return engine, engine.update(batch.split(parts), clock)

    (whole, first), (cut, second) = run(1), run(4)
    assert first.loss == pytest.approx(second.loss, abs=1e-6)
    for a, b in zip(gradients(whole), gradients(cut), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Numbers(Objective):
    """The samples' own numbers, and their mean, which for no sample is no number."""

    def forward(self, views, context):
        values = context.batch.draws.float()
        return Terms(values, torch.ones_like(values), context.batch["image"].sample_index, {"mean": values.mean()})


def test_numbers_of_a_micro_batch_without_terms_do_not_count():
    engine = Engine(encoder(), [Weighted("numbers", Numbers(), 1.0)], Companions(), SingleProcess(), seed=0)
    result = engine.update(pairs(3).split(5), Clock(0, 10))
    assert result.losses == {"numbers": pytest.approx(1.0)}
    assert result.scalars == {"numbers/mean": pytest.approx(1.0)}


def test_distillation_reads_the_companion_and_bridges_widths():
    teacher = Companions([Companion("teacher", encoder(seed=9, embed_dim=24), None)])
    for target in ("feature", "similarity"):
        model = encoder()
        engine = engine_of(model, [DistillOptions(target=target)], companions=teacher)
        result = engine.update(pairs(6).split(2), Clock(0, 10))
        assert result.loss > 0
        assert model.vision.patch.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in teacher.models()["teacher"].parameters())


def test_a_copy_of_the_model_as_teacher_has_nothing_to_teach():
    model = encoder()
    teacher = Companions([Companion("teacher", encoder(), None)])
    for target in ("feature", "similarity"):
        result = engine_of(model, [DistillOptions(target=target)], companions=teacher).update([pairs(6)], Clock(0, 10))
        assert result.loss == pytest.approx(0.0, abs=1e-6)


def test_first_loss_of_softmax_is_log_batch_when_embeddings_agree():
    model = encoder()
    with torch.no_grad():
        for tower in (model.vision, model.text):
            tower.projection.weight.zero_()
            tower.projection.weight[0] = 0
    with torch.no_grad():
        model.log_scale.zero_()
    result = engine_of(model, [ContrastiveOptions()]).update([pairs(6)], Clock(0, 10))
    assert result.loss == pytest.approx(torch.log(torch.tensor(6.0)).item(), abs=1e-6)
