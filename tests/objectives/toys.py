"""A small model that puts pictures among tokens, and batches for it: N positions a picture, C channels, V ids."""

import torch
from torch import nn

from vlm.config.options import Options
from vlm.models import Model
from vlm.objectives import BuildContext
from vlm.training.companions import Companion, Companions
from vlm.training.engine import Clock, Engine, Weighted
from vlm.types import (
    Batch,
    Context,
    Layout,
    Outputs,
    Pictures,
    SingleProcess,
    TokenIds,
    Views,
    Vocabulary,
    VocabularyLayout,
)
from vlm.types.layout import IGNORE, Modality

PLACEHOLDER = 3
VOCABULARY = VocabularyLayout.of_text(40, {"bos": 1, "eos": 2, "pad": 0, "image": PLACEHOLDER})
CLOCK = Clock(0, 10)


class Expanding(Model):
    """The placeholder gives way to the N positions of its picture; a running mean mixes the positions of a document."""

    kind = "toy"
    offers = {"tokens": frozenset({"vocabulary", "hidden"})}

    def __init__(self, seed=0, vocab=40, width=8, positions=3, kept=None, bias=None, softcap=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.options, self.vocabulary = Options(), VOCABULARY
        self.positions, self.kept, self.softcap = positions, kept, softcap
        self.embed = nn.Embedding(40, width)
        self.see = nn.Linear(12, positions * width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Parameter(torch.randn(vocab, width) * 0.7)
        self.register_buffer("bias", bias)
        self.double()

    @property
    def picture_positions(self):
        return self.positions if self.kept is None else len(self.kept)

    @property
    def training_positions(self):
        return self.picture_positions

    def encode(self, batch, wanted):
        return {name: self.read(batch, *name.partition("@")[::2]) for name in wanted}

    def read(self, batch, stream, pictures):
        text, pictures = batch[stream], batch[pictures or "image"]
        seen = self.see(pictures.values.double().flatten(1)).view(len(pictures), self.positions, self.mix.in_features)
        rows = []
        for row in range(len(text)):
            own = iter((pictures.sample_index == text.sample_index[row]).nonzero().flatten().tolist())
            entries, kept = [], 0
            for place in range(text.values.shape[1]):
                token = int(text.values[row, place])
                counted = text.supervised is None or bool(text.supervised[row, place])
                segment = 0 if text.segment is None else int(text.segment[row, place])
                if not text.mask[row, place]:
                    continue
                if token != PLACEHOLDER:
                    entries.append((self.embed.weight[token], kept, segment, Modality.TEXT, token if counted else IGNORE, -1))
                    kept += 1
                    continue
                picture = next(own)
                for n in range(self.positions):
                    if self.kept is None or n in self.kept:
                        entries.append((seen[picture, n], kept, segment, Modality.IMAGE, IGNORE, picture))
                    kept += 1
            rows.append(entries)
        longest = max((len(entries) for entries in rows), default=0)
        empty = (self.embed.weight.new_zeros(self.embed.weight.shape[1]), -1, -1, 0, IGNORE, -1)
        rows = [entries + [empty] * (longest - len(entries)) for entries in rows]
        width = self.embed.weight.shape[1]
        vectors = [entry[0] for entries in rows for entry in entries]
        x = (torch.stack(vectors) if vectors else self.embed.weight[:0]).view(len(rows), longest, width)
        kept, segment, modality, label, picture = (
            torch.tensor([int(entry[i]) for entries in rows for entry in entries]).long().view(len(rows), longest) for i in range(1, 6)
        )
        past = (segment[:, :, None] == segment[:, None]).double().tril()
        layout = Layout(
            segment >= 0, kept.clamp(min=0), segment, modality, kept * 0, label, picture, kept, text.sample_index
        )
        hidden = torch.tanh(self.mix(past @ x / past.sum(-1, keepdim=True)) + x)
        return Outputs(
            text.sample_index,
            text.mask.any(1),
            vocabulary=Vocabulary(hidden, self.head, self.bias, self.softcap),
            hidden={0: x, 1: hidden},
            layout=layout,
        )


def tokens(rows, answers, sample_index=None, segment=None):
    """rows: lists of ids; answers: for each, how many of its last tokens are supervised."""
    longest = max(len(row) for row in rows)
    ids, mask, supervised = (torch.zeros(len(rows), longest, dtype=kind) for kind in (torch.int64, torch.bool, torch.bool))
    for i, (row, answer) in enumerate(zip(rows, answers)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        supervised[i, len(row) - answer : len(row)] = True
    index = torch.arange(len(rows)) if sample_index is None else torch.tensor(sample_index)
    return TokenIds(ids, mask, index, segment=segment, supervised=supervised)


def pictures(sample_index, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(sample_index)
    values = torch.rand(n, 3, 2, 2, generator=generator)
    return Pictures(values, torch.ones(n, dtype=torch.bool), torch.tensor(sample_index, dtype=torch.int64))


def batch_of(size, **streams):
    index = torch.arange(size)
    named = {name.replace("__", "."): stream for name, stream in streams.items()}
    return Batch(named, [f"k{i}" for i in range(size)], index, index * 0)


def mixed_batch():
    """Five samples: a picture; none; two pictures; a picture and nothing supervised; a picture after text."""
    rows = [[1, 3, 9, 10, 2], [1, 7, 8, 2], [1, 3, 11, 3, 12, 13, 2], [1, 3, 5], [1, 20, 3, 21, 22, 23, 2]]
    return batch_of(
        5,
        text=tokens(rows, [3, 2, 3, 0, 1]),
        image=pictures([0, 2, 2, 3, 4]),
        image__noisy=pictures([0, 2, 2, 3, 4], seed=1),
    )


def packed():
    """The same two documents in one row of one sample, and in two rows of one."""
    first, second = [1, 9, 10, 11, 2], [12, 13, 14]
    one = tokens([first + second], [8], segment=torch.tensor([[0] * 5 + [1] * 3]))
    two = tokens([first, second], [5, 3], sample_index=[0, 0])
    return [batch_of(1, text=stream, image=pictures([])) for stream in (one, two)]


def view_of(model, batch, stream="text"):
    """What the model says of one stream: the factors of its logits."""
    return model.encode(batch, {stream: frozenset({"vocabulary"})})[stream]


def views_of(batch, requests, **models):
    """Views as the engine makes them, but a companion's carry a gradient too."""
    views = Views()
    for request in requests:
        key = str(request).rpartition(".")[0]
        who, stream = key.split("/")
        views[key] = view_of(models[who], batch, stream)
    return views


def apply(options, batch, model, **companions):
    """(the objective, its terms) on one batch, with the check that the engine makes of `count`."""
    objective = options.build(BuildContext(model, companions)).double()
    views = views_of(batch, objective.requires, model=model, **companions)
    terms = objective(views, Context(batch, SingleProcess()))
    assert float(terms.weights.sum()) == float(objective.count(batch))
    return objective, terms


def loss_of(terms):
    return terms.total() / terms.weights.sum()


def engine_of(model, options, **companions):
    members = Companions([Companion(name, companion, None) for name, companion in companions.items()])
    entries = [Weighted(o.name, o.build(BuildContext(model, members.models())).double(), o.weight) for o in options]
    return Engine(model, entries, members, SingleProcess(), seed=0)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def logits_by_hand(view):
    """[n, T, V] of a view, all at once."""
    return view.vocabulary.logits()


def targets_by_hand(layout, unit="causal"):
    """(row, position of the logits, position of the target) of every target, by plain loops."""
    for row in range(layout.label.shape[0]):
        for t in range(layout.label.shape[1]):
            at = t if unit == "masked" else t - 1
            if not layout.mask[row, t] or layout.label[row, t] == IGNORE:
                continue
            if at >= 0 and layout.segment[row, at] == layout.segment[row, t]:
                yield row, at, t
