"""Classification by a linear head over an embedding, the objective's own or the model's, or by cosines with texts of the classes.

B samples, E width, K classes, P texts. Sources: linear probe of clip, gpt4image, swin-v2, coop, pcb.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Batch, Context, Outputs, Request, Terms, Views


class CosineHead(Options):
    """The model's scale times the cosine with each class's texts, a stream of kind `classes`."""

    kind: Literal["cosine"] = "cosine"
    texts: str = Field("classes", description="stream with the texts of the classes")
    reduce: Literal["score-mean", "score-max", "embedding-mean"] = Field(
        "score-mean", description="how several texts of a class become one score; embedding-mean: the cosine with their mean"
    )

    def cosines(self, x: Tensor, texts: Tensor, owner: Tensor, classes: int) -> Tensor:
        """[B, K] of unit vectors x [B, E] and texts [P, E], text p of class owner[p]; every class has a text."""
        if self.reduce == "score-max":
            scores = x @ texts.T
            return scores.new_full((len(x), classes), -torch.inf).scatter_reduce(1, owner.expand(len(x), -1), scores, "amax")
        counts = torch.zeros(classes, dtype=texts.dtype, device=texts.device).index_add(0, owner, torch.ones_like(owner, dtype=texts.dtype))
        mean = torch.zeros(classes, texts.shape[1], dtype=texts.dtype, device=texts.device).index_add(0, owner, texts) / counts[:, None]
        return x @ (F.normalize(mean, dim=-1) if self.reduce == "embedding-mean" else mean).T  # a mean of scores is linear in the texts


class ClassificationOptions(ObjectiveOptions):
    """Cross-entropy of a linear head against the `label` stream (`data.label` names its field)."""

    kind: Literal["classification"] = "classification"
    name: str = "classification"
    stream: str = Field("image", description="stream whose embedding is classified")
    by: str = Field("model", description="who embeds it: model, or a companion, whose embeddings a cache can keep from epoch to epoch")
    head: Literal["own", "model"] | CosineHead = Field(
        "own",
        description="own: a head of the objective, saved beside the model; model: the head of the model itself (model.classes); "
        '{ kind = "cosine" }: texts of the classes',
    )
    normalise: bool = Field(True, description="the own head reads unit vectors")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")

    @model_validator(mode="after")
    def _own_head(self) -> ClassificationOptions:
        self.read_only_where(self.head == "own", 'head = "own"', "normalise")
        self.read_only_where(self.head != "model", 'head = "own" or a cosine', "by")
        return self

    def build(self, context: BuildContext) -> Classification:
        if not context.classes:
            raise ValueError("it needs the classes of a field: set data.label")
        if isinstance(self.head, CosineHead):
            if context.model.temperature()[0] is None:
                raise ValueError(f"a {context.model.kind} model has no scale of cosines")
            return Classification(self, list(context.classes), 0)
        if self.head == "model":
            names: tuple[str, ...] = tuple(getattr(context.model, "classes", ()))
            unknown = [name for name in context.classes if name not in names]
            if unknown:
                raise ValueError(f"the model has no class {unknown[0]!r} (model.classes: {', '.join(names) or 'none'})")
            return Classification(self, list(context.classes), 0, [names.index(name) for name in context.classes])
        if self.by != "model" and self.by not in context.companions:
            raise ValueError(f"it needs [companions.{self.by}]")
        seeing = context.model if self.by == "model" else context.companions[self.by]
        return Classification(self, list(context.classes), int(getattr(seeing.options, "embed_dim")))  # noqa: B009


class Classification(Objective):
    """values [B]; a sample without a known class has weight 0."""

    columns: Tensor

    def __init__(self, options: ClassificationOptions, classes: list[str], width: int, columns: list[int] | None = None) -> None:
        """columns: of the model's head, the logit of each of `classes`; None: a head of its own over `width` numbers."""
        super().__init__()
        self.options = options
        self.reads = ("label",)
        if columns is not None:
            self.requires = (Request.parse(f"model/{options.stream}.logits"),)
            self.register_buffer("columns", torch.tensor(columns), persistent=False)
            return
        if isinstance(options.head, CosineHead):
            self.count_of_classes = len(classes)
            self.requires = tuple(map(Request.parse, (f"{options.by}/{options.stream}.embedding", f"model/{options.head.texts}.embedding")))
            return
        self.classes = classes
        self.requires = (Request.parse(f"{options.by}/{options.stream}.embedding"),)
        self.head = nn.Linear(width, len(classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def count(self, batch: Batch) -> Tensor:
        return batch["label"].mask.sum().double()

    def forward(self, views: Views, context: Context) -> Terms:
        view, labels = views[f"{self.options.by}/{self.options.stream}"], context.batch["label"]
        known = labels.values.clamp(min=0)
        if self.options.head == "model":
            assert view.logits is not None
            logits, wanted = view.logits.float(), self.columns[known]
        elif isinstance(self.options.head, CosineHead):
            logits, wanted = self._cosine_logits(view, views[f"model/{self.options.head.texts}"], self.options.head), known
        else:
            assert view.embedding is not None
            x = view.embedding.to(self.head.weight.dtype)
            logits, wanted = self.head(F.normalize(x, dim=-1) if self.options.normalise else x), known
        values = F.cross_entropy(logits, wanted, reduction="none", label_smoothing=self.options.smoothing)
        hits = (logits.detach().argmax(-1) == wanted) & labels.mask
        return Terms(
            values,
            labels.mask.to(values.dtype),
            view.sample_index,
            scalars={"top1": 100 * hits.sum() / labels.mask.sum().clamp(min=1)},
        )

    def _cosine_logits(self, view: Outputs, texts: Outputs, head: CosineHead) -> Tensor:
        """[B, K]: the model's scale * cosine. Its bias is the same for every class and left out."""
        assert view.embedding is not None
        assert texts.embedding is not None
        assert texts.log_scale is not None
        x, rows = (F.normalize(embedding.float(), dim=-1) for embedding in (view.embedding, texts.embedding))
        return texts.log_scale.exp() * head.cosines(x, rows, texts.sample_index, self.count_of_classes)
