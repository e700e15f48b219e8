"""What a user feels: one training step of whole models without their data, native operators beside torch's alone.

Presets as they are but for the length of what they read; forward, loss, gradients and AdamW in float32 over made-up batches.
Every arm has weights and moments of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from vlm.bench.case import Arm, Case, Work, with_backend
from vlm.types import Batch, Labels, Pictures, Stream, TokenIds

PEER = "the same step in torch operators"
PAIRS = 10
"""Interleaved repeats of a step, of which the median is taken."""


def _pictures(count: int, side: int) -> Pictures:
    values = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
    return Pictures(values, torch.ones(count, dtype=torch.bool), torch.arange(count))


def _batch(count: int, streams: dict[str, Stream]) -> Batch:
    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch(streams, [str(i) for i in range(count)], zeros, zeros)


def pairs(count: int = 128) -> Batch:
    """Pictures of 64 pixels with captions of 4 to 31 ids in 32 places."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, 4096, (count, 32), generator=generator)
    lengths = torch.randint(4, 32, (count,), generator=generator)
    ids[torch.arange(count), lengths - 1] = 1
    text = TokenIds(ids, torch.arange(32) < lengths[:, None], torch.arange(count))
    return _batch(count, {"image": _pictures(count, 64), "text": text})


def photographs(count: int = 8) -> Batch:
    """224 pixels: 50 tokens of a ViT-B/32."""
    return _batch(count, {"image": _pictures(count, 224)})


def swin_pictures(count: int = 8) -> Batch:
    """64 pixels, six in ten places hidden, a class each."""
    image = _pictures(count, 64)
    hidden = replace(image, masked=torch.rand(count, 4, 4, generator=torch.Generator().manual_seed(4)) < 0.6)
    label = Labels(torch.arange(count), image.mask, image.sample_index)
    return _batch(count, {"image": image, "image.masked": hidden, "label": label})


def documents(rows: int = 2, length: int = 2048, mean: int = 256) -> Batch:
    """Packed rows: documents of random lengths, `mean` ids on average."""
    from vlm.data.packing import PackedRow, pack_batch

    generator = torch.Generator().manual_seed(length)

    def row() -> PackedRow:
        cuts = torch.randperm(length - 1, generator=generator)[: length // mean - 1].sort().values + 1
        ids = torch.randint(3, 4096, (length,), generator=generator)
        return PackedRow("made", 0, 0, ids.tolist(), [0, *cuts.tolist()])

    return pack_batch([row() for _ in range(rows)], length, 0)


def step(preset: str, batch: Callable[[], Batch], stage: int = 0, overrides: Sequence[str] = ()) -> Callable[[], dict[Arm, Work]]:
    """A step of a stage of a preset under its objectives."""

    def stepper() -> Work:
        from vlm.objectives import BuildContext
        from vlm.training.preset import load_preset, stages_of
        from vlm.types import Context, SingleProcess, Views, VocabularyLayout
        from vlm.types.outputs import wanted_of

        settings = stages_of(load_preset(preset, overrides)[1])[stage]
        assert settings.model is not None
        size = getattr(settings.tokenizer, "vocab_size", None)
        torch.manual_seed(0)
        model = settings.model.build(VocabularyLayout.of_text(size, {"pad": 0, "eos": 1, "bos": 2}) if size else VocabularyLayout({}, {}))
        context = BuildContext(model.train(), classes=getattr(settings.model, "classes", ()))
        objectives = [options.build(context) for options in settings.objectives]
        parameters = [p for module in (model, *objectives) for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)
        samples, told = batch(), Context(batch(), SingleProcess())
        wanted = wanted_of([request for objective in objectives for request in objective.requires], "model")

        def run() -> object:
            views = Views({f"model/{key}": out for key, out in model.encode(samples, wanted).items()})
            terms = [objective(views, told) for objective in objectives]
            optimizer.zero_grad()
            sum(t.total() / t.weights.sum() for t in terms).backward()
            optimizer.step()
            return [t.values for t in terms]

        return run

    return _three(stepper)


def tower(count: int = 8) -> Callable[[], dict[Arm, Work]]:
    """A step of the picture tower of preset `clip`, ViT-B/32, towards a fixed direction."""

    def stepper() -> Work:
        from vlm.training.preset import load_preset
        from vlm.types import VocabularyLayout

        settings = load_preset("clip")[0].model
        assert settings is not None
        torch.manual_seed(0)
        model = settings.build(VocabularyLayout.of_text(16, {"pad": 0, "eos": 1, "bos": 2})).train()
        samples, wanted = photographs(count), {"image": frozenset({"embedding"})}
        parameters = [p for name, p in model.named_parameters() if not name.startswith("text")]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)

        def run() -> object:
            embedding = model.encode(samples, wanted)["image"].embedding
            assert embedding is not None
            optimizer.zero_grad()
            embedding[:, 0].sum().backward()
            optimizer.step()
            return embedding

        return run

    return _three(stepper)


def _three(stepper: Callable[[], Work]) -> Callable[[], dict[Arm, Work]]:
    def build() -> dict[Arm, Work]:
        return {"native": with_backend("native", stepper()), "dispatched": stepper(), "peer": with_backend("torch", stepper())}

    return build


STEP_CASES: tuple[Case, ...] = (
    Case("step/clip-tiny/128 pairs", PEER, step("clip-tiny", pairs), repeats=PAIRS),
    Case("step/vit-b-32/8 pictures", PEER, tower(), repeats=PAIRS),
    Case("step/swin-v2/masked-pixels", PEER, step("swin-v2", swin_pictures), repeats=PAIRS),
    Case("step/swin-v2/classification", PEER, step("swin-v2", swin_pictures, 1), repeats=PAIRS),
    Case("step/lm-tiny/2 x 2048 packed", PEER,
         step("lm-tiny", documents, overrides=("model.length=2048", "data.packer.length=2048")), repeats=PAIRS),
)
