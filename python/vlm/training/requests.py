"""Whether the models of a stage can give what its objectives ask: said before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm.config.errors import RequestError
from vlm.data.options import DataOptions
from vlm.models import Model
from vlm.training.companion_options import CompanionOptions
from vlm.types import Batch, Pictures, Request, Stream, TokenIds

Asked = Mapping[str, Sequence[Request]]
"""Name of an objective -> what it requires."""


def check_offers(asked: Asked, models: Mapping[str, Model]) -> None:
    """What needs no data: fields that no stream of the model has, and contexts that it does not take.

    models: by companion, the run's own as `model`. Raises RequestError with objective, request and what the model offers.
    """
    for objective, requests in asked.items():
        for request in requests:
            model = models[request.companion]
            if not any(request.field in fields for fields in model.offers.values()):
                raise _refusal(objective, request, model, f"has no {request.field}")
            if request.context is not None and not model.takes_context:
                raise _refusal(objective, request, model, "reads no text together with a picture stream (the part after @)")


def check_streams(asked: Asked, models: Mapping[str, Model], batch: Batch) -> None:
    """What a first batch shows: streams that the data do not give, and fields that a stream of this kind has not.

    Raises RequestError like `check_offers`.
    """
    for objective, requests in asked.items():
        for request in requests:
            model = models[request.companion]
            for name in (request.stream, request.context):
                if name is not None and name not in batch:
                    raise _missing(f"objective {objective!r} asks for {request}", name, batch)
            if request.context is not None and not isinstance(batch[request.context], Pictures):
                raise _refusal(objective, request, model, f"reads a text with pictures, and {request.context!r} holds none")
            kind = _kind(batch[request.stream])
            if kind is not None and request.field not in model.offers.get(kind, ()):
                raise _refusal(objective, request, model, f"has no {request.field} of {kind}")


def check_caches(asked: Asked, companions: Mapping[str, CompanionOptions], data: DataOptions) -> None:
    """A cached embedding stands for a sample in every epoch. Raises RequestError where the sample differs from epoch to epoch."""
    for objective, requests in asked.items():
        for request in requests:
            table = companions.get(request.companion)
            why = _drawn(request.stream, data) if table is not None and table.cache else None
            if why is not None:
                raise RequestError(
                    f"objective {objective!r} asks for {request}, companion {request.companion!r} keeps its embeddings, and {why}",
                    remedy=f"set companions.{request.companion}.cache = false",
                )


def _drawn(stream: str, data: DataOptions) -> str | None:
    """The table that draws a stream anew in every epoch; None for one that stays."""
    made = {*data.streams, *(name for part in data.mixture.values() for name in part.streams)}
    if stream in made:
        return f"data.streams.{stream} may draw another every time"
    if stream.partition(".")[0] == "image" and (data.image.augment != "none" or data.image.flip):
        return "data.image draws another crop or side every time"
    if stream == "text" and data.captions.kind != "one":
        return "data.captions draws another text every time"
    return None


def check_reads(reads: Mapping[str, Sequence[str]], batch: Batch) -> None:
    """Streams that objectives read of the batch itself (labels, weights): those that the data do not give.

    reads: by objective. Raises RequestError with objective and stream.
    """
    for objective, names in reads.items():
        for name in names:
            if name.partition("@")[0] not in batch:
                raise _missing(f"objective {objective!r} reads {name!r}", name, batch)


def _missing(what: str, name: str, batch: Batch) -> RequestError:
    known = ", ".join(sorted([*batch.streams, *batch.shared])) or "none"
    return RequestError(f"{what}, and the data give no stream {name!r}", remedy=f"streams of the data: {known}")


def _kind(stream: Stream) -> str | None:
    """How `offers` calls streams of this type; None for one that it does not speak of."""
    return "pictures" if isinstance(stream, Pictures) else "tokens" if isinstance(stream, TokenIds) else None


def _refusal(objective: str, request: Request, model: Model, why: str) -> RequestError:
    offers = "; ".join(f"of {kind}: {', '.join(sorted(fields))}" for kind, fields in sorted(model.offers.items()))
    return RequestError(
        f"objective {objective!r} asks for {request}, and a {model.kind} model {why}", remedy=f"it offers, {offers or 'nothing'}"
    )
