"""Linear probe: multinomial logistic regression on frozen picture embeddings, fitted by L-BFGS in float64.

The strength of the penalty is chosen on a dev part carved from the training part by concept, never on what is
reported. Without training data the samples are split in folds by concept and every sample is answered by a model
that saw none of its concept. Source: clip (section 3.2, linear probe with L-BFGS).

n samples, E embedding width, C classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vlm.config.errors import DataError
from vlm.evaluation.bootstrap import bootstrap, cluster_ids
from vlm.evaluation.classes import LABEL_FIELDS, label_of, labelled_field
from vlm.evaluation.material import Material
from vlm.evaluation.result import Result, figures
from vlm.evaluation.task import Fields, Task, as_fields

Wide = NDArray[np.float64]
Integers = NDArray[np.int64]

_SMALL = 2**24  # multiplications of one product that a single thread does as fast


class LinearProbeOptions(Task):
    """A linear classifier on frozen embeddings."""

    task: Literal["linear-probe"] = "linear-probe"
    labels_from: Fields | None = Field(
        None,
        description="data field that holds a sample's class, or several: the first one that the data has",
    )
    train: str | None = Field(
        None, description="data to fit on; default: folds of the evaluated data by concept"
    )
    folds: int = Field(5, ge=2, description="folds by concept where no training data is given")
    penalties: tuple[float, ...] = Field(
        tuple(10.0**e for e in range(-4, 2)),
        min_length=1,
        description="tried strengths of 1/2 |W|^2 per sample",
    )
    dev_share: float = Field(
        0.2, gt=0, lt=1, description="part of the training concepts that chooses the penalty"
    )
    iterations: int = Field(100, gt=0, description="greatest number of L-BFGS iterations a fit")

    @model_validator(mode="after")
    def _chosen_among(self) -> LinearProbeOptions:
        self.read_only_where(self.train is None, "the evaluated data are fitted on (no train)", "folds")
        self.read_only_where(len(self.penalties) > 1, "one of several penalties is chosen", "dev_share")
        return self

    def run(self, material: Material, train: Material | None = None) -> Result:
        return linear_probe(material, train, self)


def fit(
    x: Wide,
    labels: Integers,
    classes: int,
    penalty: float,
    *,
    start: Wide | None = None,
    iterations: int = 200,
) -> Wide:
    """[C, E+1] weights and bias (last column) that minimise mean cross-entropy + penalty/2 |W|^2 (bias free).

    x [n, E] float64, labels [n] in 0..C-1; start: weights to begin from.
    """
    import torch  # only a fit needs it; other tasks run on a bundle without torch

    features = torch.from_numpy(np.ascontiguousarray(x))
    targets = torch.from_numpy(labels)
    initial = np.zeros((classes, x.shape[1] + 1)) if start is None else start
    weight = torch.tensor(initial, dtype=torch.float64)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
    )

    rows = torch.arange(len(targets))
    weight.grad = torch.zeros_like(weight)

    def closure() -> torch.Tensor:
        # The gradient is written out: softmax minus one-hot. Autograd would take twice the time of such small products.
        slopes = weight[:, :-1]
        log_p = torch.log_softmax(torch.addmm(weight[:, -1], features, slopes.T), dim=1)
        loss = -log_p[rows, targets].mean() + penalty / 2 * slopes.pow(2).sum()
        residual = log_p.exp_()
        residual[rows, targets] -= 1
        residual /= len(rows)
        assert weight.grad is not None
        torch.mm(residual.T, features, out=weight.grad[:, :-1])
        weight.grad[:, :-1].add_(slopes, alpha=penalty)
        torch.sum(residual, dim=0, out=weight.grad[:, -1])
        return loss

    threads = torch.get_num_threads()
    if x.size * classes < _SMALL:
        torch.set_num_threads(1)  # products this small only wait for each other's threads
    try:
        solver.step(closure)
    finally:
        torch.set_num_threads(threads)
    return weight.detach().numpy()


def predict(x: Wide, weight: Wide) -> Integers:
    """[n] the class with the greatest logit."""
    return np.argmax(x @ weight[:, :-1].T + weight[:, -1], axis=1)


def split_by_concept(
    concepts: Sequence[Hashable], share: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """[n] true for samples of a random `share` of the concepts; both sides hold at least one concept."""
    ids = cluster_ids(concepts)
    count = int(ids.max()) + 1
    if count < 2:
        raise DataError("all samples are of one concept, the probe needs at least two to split")
    held = np.zeros(count, dtype=bool)
    held[generator.permutation(count)[: min(max(1, round(share * count)), count - 1)]] = True
    return held[ids]


def probe(
    train_x: Wide,
    train_y: Integers,
    concepts: Sequence[Hashable],
    test_x: Wide,
    options: LinearProbeOptions,
    generator: np.random.Generator,
) -> tuple[Integers, float]:
    """(predicted classes of test_x, chosen penalty). Features are scaled by the training part's mean and spread."""
    mean, spread = train_x.mean(0), train_x.std(0)
    spread[spread < 1e-8] = 1.0
    train_x, test_x = (train_x - mean) / spread, (test_x - mean) / spread
    classes = int(train_y.max()) + 1
    chosen = options.penalties[0]
    if len(options.penalties) > 1:
        dev = split_by_concept(concepts, options.dev_share, generator)
        best, weight = -1.0, None
        # From strong to weak, each fit beginning where the stronger one ended; of equals the stronger wins.
        for penalty in sorted(options.penalties, reverse=True):
            weight = fit(
                train_x[~dev], train_y[~dev], classes, penalty, start=weight, iterations=options.iterations
            )
            right = float((predict(train_x[dev], weight) == train_y[dev]).mean())
            if right > best:
                best, chosen = right, penalty
    weight = fit(train_x, train_y, classes, chosen, iterations=options.iterations)
    return predict(test_x, weight), chosen


def labels_in(material: Material, fields: Fields | None) -> tuple[list[str | None], str]:
    """Each sample's class label from a field, the first of the usual names when none is given."""
    name = labelled_field(material.fields, LABEL_FIELDS if fields is None else as_fields(fields))
    return [label_of(sample.get(name)) for sample in material.fields], name


def linear_probe(material: Material, train: Material | None, options: LinearProbeOptions) -> Result:
    """top1 in percent over the evaluated samples; a class that training never saw counts as wrong."""
    assert material.images is not None
    labels, field = labels_in(material, options.labels_from)
    fit_labels = labels_in(train, field)[0] if train is not None else labels
    names = {label: i for i, label in enumerate(sorted({label for label in fit_labels if label is not None}))}
    kept = np.array([label is not None for label in labels])
    x = material.images[kept].astype(np.float64)
    y = np.array([names.get(label, -1) for label in labels if label is not None], dtype=np.int64)
    concepts = [c for c, k in zip(material.concepts(), kept) if k]
    generator = np.random.default_rng([options.seed, 3])
    answers = np.full(len(y), -2, dtype=np.int64)
    penalties: list[float] = []
    if train is not None:
        assert train.images is not None
        has = np.array([label is not None for label in fit_labels])
        train_x = train.images[has].astype(np.float64)
        train_y = np.array([names[label] for label in fit_labels if label is not None], dtype=np.int64)
        train_concepts: list[Any] = [c for c, k in zip(train.concepts(), has) if k]
        answers, penalty = probe(train_x, train_y, train_concepts, x, options, generator)
        penalties.append(penalty)
    else:
        ids = cluster_ids(concepts)
        count = int(ids.max()) + 1
        if count < options.folds + 1:
            raise DataError(
                f"{count} concepts are too few for {options.folds} folds", remedy="give --train URI"
            )
        fold = generator.permutation(count)[ids] % options.folds
        train_y = y
        for number in range(options.folds):
            test = fold == number
            # Classes are renumbered by what this fold's training part holds.
            held, compact = np.unique(y[~test], return_inverse=True)
            inside = [c for c, t in zip(ids.tolist(), test) if not t]
            found, penalty = probe(x[~test], compact.astype(np.int64), inside, x[test], options, generator)
            answers[test] = held[found]
            penalties.append(penalty)
    right = (answers == y).astype(np.float64)
    estimate = bootstrap(right, clusters=concepts, resamples=options.resamples, seed=options.seed, share=True)
    metrics, intervals = figures(("top1",), estimate, 100.0)
    often = int(np.bincount(train_y).argmax())
    details = {
        "classes": len(names),
        "labels_from": field,
        "unlabelled": int((~kept).sum()),
        "clusters": estimate.clusters,
        "unseen_classes": int((y < 0).sum()),
        "penalties": penalties,
        "protocol": "fitted on separate training data"
        if train is not None
        else f"{options.folds} folds by concept",
        "train": None if train is None else {"samples": len(train_y), "sha256": train.fingerprint},
    }
    # Guessing here means always answering training's most frequent class.
    chance = {"top1": round(100 * float((y == often).mean()), 6)}
    return Result("linear-probe", options.title, len(y), metrics, intervals, chance, details)
