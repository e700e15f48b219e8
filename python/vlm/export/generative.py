"""Bundles of models that write: what bundle.json says of them, and the check that they write what the model writes.

n rows, V vocabulary, S side of the model's input, K visual tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.config.errors import GateFailed
from vlm.evaluation.generator import TorchGenerator, language_part, open_generator
from vlm.export.drawings import GOLDEN_SIZES, GOLDEN_TEXTS, ODD_SIZES, drawn_picture
from vlm.export.parity import Check, compare
from vlm.export.preprocess_graph import preprocess_graph
from vlm.export.source import Source
from vlm.models import VisionLanguageModel
from vlm.models.vision_language.graphs import drops_of, pixels_of
from vlm.runtime.bundle import open_any_bundle
from vlm.runtime.chat import Message
from vlm.runtime.generation import Generator, Prompt
from vlm.runtime.generator import BundleGenerator, Prepared
from vlm.runtime.tiled import TiledPicture, cut_picture

STEPS = 12
"""Tokens of a golden answer, at most."""
NEAR = 0.005
"""Two best logits nearer than this may change places by rounding: a golden answer ends before."""
ASKED = ((GOLDEN_TEXTS[0], 1), (GOLDEN_TEXTS[1], 0), (GOLDEN_TEXTS[2], 2), (GOLDEN_TEXTS[3], 1))
"""Text and number of pictures."""


def preprocess_graphs(source: Source, folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the preprocessing of every picture stream; graph name -> its entry in bundle.json."""
    out = {}
    for stream, preprocess in _preprocesses(source).items():
        name = _preprocess_name(stream)
        path = f"onnx/{name.replace('.', '_')}.onnx"
        (folder / path).write_bytes(preprocess_graph(preprocess, opset=max(18, min(source.opset, 21))).SerializeToString())
        out[name] = {"path": path}
    return out


def described(source: Source, about: dict[str, Any]) -> dict[str, Any]:
    """`about` with template, special ids, shape of the decoder and, of a model that reads them, pictures."""
    if "embed" not in source.parts:
        return about
    torch_model = _torch(source)
    attention: Any = language_part(torch_model.model).trunk.blocks[0].attention
    decoder: dict[str, Any] = {
        "layers": language_part(torch_model.model).options.depth,
        "width": language_part(torch_model.model).options.width,
        "kv_heads": attention.kv_heads,
        "head_width": attention.head_width,
    }
    tokenizer = source.tokenizer
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "eos_ids": sorted(torch_model.eos_ids)}
    extra: dict[str, Any] = {}
    model = source.model
    if isinstance(model, VisionLanguageModel):
        ids["image_id"] = model.vocabulary.special["image"]
        streams = {
            s: {"graph": _preprocess_name(s), "input": pixels_of(s), "size": p.size, "resize": p.resize, "resampling": int(p.resampling)}
            for s, p in _preprocesses(source).items()
        }
        positions = model.picture_positions
        extra["pictures"] = {"tokens": model.picture_tokens, "positions": 1 if positions is None else positions, "streams": streams}
        if model.tiling is not None:
            extra["pictures"]["tiling"] = asdict(model.tiling)
        decoder["cross"] = [int(layer) for layer in model.cross]
        if model.tiles_apart:
            decoder["apart"] = True
        drops = drops_of(model)
        if drops:
            assert model.options.tokens is not None
            decoder["drops"] = {str(layer): count for layer, count in drops.items()}
            decoder["renumber"] = model.options.tokens.apply.positions == "renumber"
    return about | {"text": about["text"] | ids, "template": torch_model.template.to_dict(), "decoder": decoder} | extra


def check(source: Source, folder: Path) -> tuple[dict[str, Any], list[Check]]:
    """(golden prompts with their answers, checks): whole pictures, prompts in batches, tokens after them.

    Writes the golden pictures. Raises GateFailed where the runtime makes other prompts.
    """
    bundle = open_any_bundle(folder, verify=False)
    assert isinstance(bundle, BundleGenerator)
    theirs = _torch(source)
    checks = _check_pictures(source, bundle)
    cases, prompts, own = [], [], []
    for number, (text, count) in enumerate(ASKED):
        pictures = [drawn_picture(*GOLDEN_SIZES[(number + i) % len(GOLDEN_SIZES)], number) for i in range(count)]
        pictures = pictures if _preprocesses(source) else []
        messages = [Message("user", (text,))]
        prepared = [bundle.prepare_image(picture) for picture in pictures]
        prompt = theirs.prompt(messages, [_as_data(source, pixels) for pixels in prepared])
        if theirs.positions(prompt) >= theirs.length:
            continue
        mine = bundle.prompt(messages, prepared)
        if list(mine.ids) != list(prompt.ids) or bundle.positions(mine) != theirs.positions(prompt):
            raise GateFailed(f"the runtime makes another prompt of {text!r}", remedy="nothing was published")
        names = []
        for i, picture in enumerate(pictures):
            names.append(f"picture-{number}-{i}.png")
            picture.save(folder / "golden" / names[-1])
        cases.append({"text": text, "pictures": names, "ids": list(prompt.ids)})
        prompts.append(prompt)
        own.append(mine)
    for batch in _batches(len(prompts)):
        checks += _compare_steps(theirs, bundle, [prompts[i] for i in batch], [own[i] for i in batch])
    answers = [golden_answer(theirs, prompt, NEAR) for prompt in prompts]
    nats = theirs.nats(prompts, answers)
    return {"prompts": [c | {"answer": a, "nats": n.tolist()} for c, a, n in zip(cases, answers, nats)]}, checks


def _batches(count: int) -> list[list[int]]:
    """Each alone, neighbours, and three at a time."""
    rows = list(range(count))
    return [*([i] for i in rows), *([i, i + 1] for i in rows[:-1]), *([i, i - 1, i - 2] for i in rows[2:])]


def _compare_steps(
    theirs: TorchGenerator, bundle: BundleGenerator, prompts: Sequence[Prompt], own: Sequence[Prompt]
) -> list[Check]:
    """Logits after the prompts and after three tokens; the rows turned around between."""
    checks = []
    steppers = theirs.stepper(), bundle.stepper()
    logits = [steppers[0].start(prompts), steppers[1].start(own)]
    room = min(theirs.length - theirs.positions(prompt) for prompt in prompts)
    for step in range(min(4, room)):
        case = f"{len(prompts)} prompts of {', '.join(str(bundle.positions(p)) for p in own)}, token {step}"
        checks.append(compare("prompt.logits", case, logits[1], logits[0]))
        if step + 1 == min(4, room):
            break
        ids = logits[0].argmax(1).astype(np.int64)
        if step == 1:
            turned = np.arange(len(ids))[::-1].copy()
            for stepper in steppers:
                stepper.reorder(turned)
            ids = ids[turned]
        logits = [stepper.advance(ids) for stepper in steppers]
    return checks


def golden_answer(generator: Generator, prompt: Prompt, near: float) -> list[int]:
    """Greedy tokens, up to an end or two whose logits are nearer than `near`: rounding might exchange them."""
    stepper = generator.stepper()
    answer: list[int] = []
    logits = stepper.start([prompt])[0]
    for step in range(min(STEPS, generator.length - generator.positions(prompt))):
        if step:
            logits = stepper.advance(np.array(answer[-1:], np.int64))[0]
        second, first = np.partition(logits, -2)[-2:]
        if first - second < near:
            break
        answer.append(int(logits.argmax()))
        if answer[-1] in generator.eos_ids:
            break
    return answer


def _check_pictures(source: Source, bundle: BundleGenerator) -> list[Check]:
    """Pictures of odd sizes to visual tokens: by the graphs, and by Pillow and the model."""
    model = source.model
    if not isinstance(model, VisionLanguageModel):
        return []
    towers = model.options.picture_streams()
    checks = []
    for number, (width, height) in enumerate(ODD_SIZES):
        picture = drawn_picture(width, height, number)
        pixels = {s: torch.from_numpy(x) for s, x in _prepared(model, picture).items()}
        with torch.no_grad():
            wanted = model.visual_tokens({tower: pixels[stream] for tower, stream in towers.items()})[0]
        got = bundle.visual_tokens([bundle.prepare_image(picture)])
        checks.append(compare("picture", f"{width} x {height}", got, wanted.numpy()))
    return checks


def _prepared(model: VisionLanguageModel, picture: Image.Image) -> dict[str, np.ndarray]:
    """Picture stream -> the pieces of one picture as training prepares them, normalised [k, 3, S, S]; k is 1 without tiles."""
    preprocesses = model.preprocesses()
    if model.tiling is None:
        return {stream: p.normalise(p.to_array(picture))[None] for stream, p in preprocesses.items()}
    cut = cut_picture(picture, model.tiling, preprocesses)
    return {stream: np.stack([p.normalise(piece) for piece in cut[stream]]) for stream, p in preprocesses.items()}


def _as_data(source: Source, prepared: Prepared) -> Prepared:
    """Normalised pixels as the model's data would give them, 0..1.

    So both sides read the same pixels: whether the graph prepares pictures as training does is a check of its own.
    """
    out = {}
    for stream, preprocess in _preprocesses(source).items():
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
        out[stream] = prepared[stream] * std + mean
    return replace(prepared, streams=out) if isinstance(prepared, TiledPicture) else out


def _torch(source: Source) -> TorchGenerator:
    model: Any = source.model
    return open_generator(model, source.tokenizer, name=source.name)


def _preprocesses(source: Source) -> dict[str, Any]:
    return source.model.preprocesses() if "vision" in source.parts else {}


def _preprocess_name(stream: str) -> str:
    """preprocess, preprocess.NAME"""
    return "preprocess" + stream.removeprefix("image")
