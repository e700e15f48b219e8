"""Write a bundle: graphs, tokenizer, preprocessing, golden vectors, checks; published only when every check holds.

n rows, E embedding width, S side of the model's input, T tokens, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.config.errors import GateFailed, RequestError
from vlm.data.tokenizer import Tokenizer
from vlm.export import card as cards
from vlm.export import generative, seeing
from vlm.export.cache_parity import check_cached, has_cache
from vlm.export.drawings import GOLDEN_SIZES, GOLDEN_TEXTS, ODD_SIZES, drawn_picture
from vlm.export.files import files_of, write_json
from vlm.export.graphs import OPSETS, export_part
from vlm.export.parity import Check, Tolerance, check_part, compare, require
from vlm.export.preprocess_graph import preprocess_graph
from vlm.export.publish import check_target, publishing
from vlm.export.source import Source
from vlm.models import Model
from vlm.models.directory import find_model_directory, read_json
from vlm.runtime.bundle import open_any_bundle, open_bundle
from vlm.runtime.embedder import normalise
from vlm.runtime.language import LanguageBundle
from vlm.runtime.manifest import GOLDEN, MANIFEST, SCHEMA
from vlm.runtime.preprocess import Preprocess
from vlm.types.export import ExportPart

FILES = {
    "dual-encoder": {"vision": "onnx/vision_model.onnx", "text": "onnx/text_model.onnx"},
    "vision": {"vision": "onnx/vision_model.onnx"},
    "language": {"decoder": "onnx/decoder_model.onnx", "decoder_with_past": "onnx/decoder_with_past_model.onnx"},
}
"""Where graphs lie that are not called onnx/PART.onnx: names that other programs look for."""
PREPROCESS = "onnx/preprocess.onnx"
COPIED = (
    "config.json", "vlm.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.jinja",
)  # fmt: skip


def export_bundle(
    model: Model,
    model_dir: str | Path,
    output: str | Path,
    *,
    opset: int = 18,
    name: str | None = None,
    tolerance: Tolerance | None = None,
    parts: dict[str, ExportPart] | None = None,
) -> dict[str, Any]:
    """Export a model to an ONNX bundle and check it. Returns the report: kind, files, parity, tolerance.

    model_dir: a run or a Hugging Face directory, from which tokenizer and preprocessing come. output: the bundle's
    directory; an older bundle there is replaced. parts: in place of the model's own export_parts().
    Raises RequestError (unsuitable output, opset or model), CheckpointError (a file of the model), RunFailed (torch
    cannot export) and GateFailed (the graphs differ from the model; nothing is published).
    """
    output = Path(output)
    check_target(output)
    if opset not in OPSETS:
        raise RequestError(f"opset {opset}, expected {OPSETS.start} to {OPSETS.stop - 1}", where="--opset")
    directory = find_model_directory(model_dir)
    was_training = model.training
    model.eval()
    try:
        chosen = model.export_parts() if parts is None else parts
        source = Source(
            model, directory, Tokenizer.load(directory) if "tokens" in type(model).offers else None, chosen,
            tolerance or Tolerance(), opset,
            name or _name_of(Path(model_dir), directory),
        )  # fmt: skip
        with publishing(output) as folder:
            return _write(source, folder) | {"output": str(output)}
    finally:
        model.train(was_training)


def _name_of(given: Path, directory: Path) -> str:
    """The run's or directory's own name: `model/` inside a run is not a name."""
    path = (directory.parent if directory.name == "model" and given.name != "model" else given).resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name or "model"


def _write(source: Source, folder: Path) -> dict[str, Any]:
    for sub in ("onnx", "golden"):
        (folder / sub).mkdir()
    checks: list[Check] = []
    graphs: dict[str, dict[str, Any]] = {}
    for part, spec in source.parts.items():
        path = FILES.get(source.model.kind, {}).get(part, f"onnx/{part}.onnx")
        export_part(part, spec, folder / path, opset=source.opset)
        if has_cache(spec):
            checks += check_cached(part, spec, folder / path)
        else:
            checks += check_part(part, spec, folder / path, vocab_size=source.vocab_size, longest=source.length)
        graphs[part] = {"path": path}
    require(checks, source.tolerance)
    _copy(source, folder)
    kind = _kind(source)
    dual = kind == "dual-encoder"
    sees = dual or kind == "vision"
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "name": source.name,
        "opset": source.opset,
        "versions": {p: _version(p) for p in ("vlm-forge", "torch", "onnx", "onnxscript", "onnxruntime", "pillow")},
        "tolerance": asdict(source.tolerance),
        "graphs": graphs,
    }
    preset = source.directory.parent / "preset.toml"
    if source.directory.name == "model" and preset.is_file():
        shutil.copyfile(preset, folder / "preset.toml")
        about["preset"] = "preset.toml"
    if sees:
        preprocess = Preprocess.from_config(read_json(folder / "preprocessor_config.json"))
        (folder / PREPROCESS).write_bytes(preprocess_graph(preprocess, opset=max(18, min(source.opset, 21))).SerializeToString())
        graphs["preprocess"] = {"path": PREPROCESS}
        about |= _describe_dual(source, preprocess) if dual else seeing.described(source, preprocess)
    else:
        graphs |= generative.preprocess_graphs(source, folder)
        about |= _describe_language(source) if kind == "language" else {"text": _describe_text(source)}
        about = generative.described(source, about)
    for graph in graphs.values():
        graph |= _signature(folder / graph["path"])
    # The runtime itself runs the last checks, so the files must be complete enough to be opened by it.
    about["files"] = files_of(folder)
    write_json(folder / MANIFEST, about)
    if dual:
        checks += _check_dual(source, preprocess, folder)
    elif sees:
        written, found = seeing.check(source, preprocess, folder)
        checks += found
        write_json(folder / GOLDEN, written)
    else:
        golden: dict[str, Any] = {}
        if kind == "language":
            golden, found = _check_language(source, folder)
            checks += found
        if "decoder" in about:
            written, found = generative.check(source, folder)
            golden, checks = golden | written, checks + found
        write_json(folder / GOLDEN, golden)
    require(checks, source.tolerance)
    about["parity"] = [c.as_dict() for c in checks]
    (folder / "README.md").write_text(cards.card(about), encoding="utf-8")
    (folder / "example.py").write_text(cards.example(about), encoding="utf-8")
    about["files"] = files_of(folder)
    write_json(folder / MANIFEST, about)
    open_any_bundle(folder).self_test()
    return {
        "kind": about["kind"],
        "name": about["name"],
        "opset": source.opset,
        "graphs": {n: g["path"] for n, g in graphs.items()},
        "bytes": sum(f["bytes"] for f in about["files"].values()),
        "checks": len(checks),
        "least_cosine": min(c.cosine for c in checks),
        "greatest_difference": max(c.max_abs for c in checks if c.part != "picture"),
        "parity": about["parity"],
        "tolerance": about["tolerance"],
    }


def _kind(source: Source) -> str:
    parts = set(source.parts)
    if {"vision", "text"} <= parts:
        return "dual-encoder"
    if parts == {"vision"}:
        return "vision"
    if {"vision", "embed"} <= parts:
        return "vision-language"
    if "decoder" in parts:
        return "language"
    named = ", ".join(source.parts)
    raise RequestError(f"a bundle of the parts {named} is not known", remedy="dual encoders, vision models and decoders are")


def _copy(source: Source, folder: Path) -> None:
    for name in COPIED:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, folder / name)
    pictures = getattr(source.model.options, "pictures", None)
    if not (folder / "preprocessor_config.json").is_file() and pictures is not None:
        options: Any = source.model.options
        size = (options.tower if source.model.kind == "vision" else options.vision).image_size
        made = Preprocess(size, pictures.resize, pictures.interpolation, pictures.mean, pictures.std)
        write_json(folder / "preprocessor_config.json", made.to_config())


def _describe_dual(source: Source, preprocess: Preprocess) -> dict[str, Any]:
    vision, text = source.parts["vision"], source.parts["text"]
    with torch.no_grad():
        width = int(vision.module(*vision.inputs.values()).shape[-1])
        log_scale, bias = source.model.temperature()
    learned = source.model.prompt
    prompt = {} if learned is None else {"prompt": learned.to_json()}
    return {
        "embedding": {
            "width": width,
            "scale": 1.0 if log_scale is None else float(log_scale.detach().exp()),
            "bias": 0.0 if bias is None else float(bias.detach()),
            "form": "softmax" if bias is None else "sigmoid",
        },
        "picture": {"size": preprocess.size, "resize": preprocess.resize, "interpolation": preprocess.interpolation},
        "text": _describe_text(source) | {"fixed_length": 1 not in text.dynamic.get("input_ids", {})} | prompt,
    }


def _describe_language(source: Source) -> dict[str, Any]:
    tokenizer = source.tokenizer
    starts = tokenizer.bos_id is not None and tokenizer.ids([""])[0][:1] == [tokenizer.bos_id]
    return {"text": _describe_text(source) | {"starts": starts, "eos_id": tokenizer.eos_id}}


def _describe_text(source: Source) -> dict[str, Any]:
    tokenizer = source.tokenizer
    return {
        "length": source.length,
        "vocab_size": source.vocab_size,
        "pad_id": tokenizer.pad_id,
        "padding_side": tokenizer.padding_side,
    }


def _check_dual(source: Source, preprocess: Preprocess, folder: Path) -> list[Check]:
    """Pictures of odd sizes and texts, encoded bytes to unit vectors; writes the golden vectors."""
    bundle = open_bundle(folder, verify=False)
    checks = []
    drawn = [drawn_picture(w, h, i) for i, (w, h) in enumerate(ODD_SIZES)]
    ours, theirs = bundle.encode_image(drawn), _torch_images(source, preprocess, drawn)
    checks += [compare("picture", f"{p.width} x {p.height}", a[None], b[None]) for p, a, b in zip(drawn, ours, theirs)]
    texts = [*GOLDEN_TEXTS, "", "a very long text " * 200, "Grüße, 你好 🙂"]
    learned = source.model.prompt
    texts += [learned.text("red circle")] if learned is not None and not learned.classes else []
    texts += [learned.text(label, label) for label in learned.classes[:2]] if learned is not None else []
    _check_ids(source, bundle.tokenizer.rows(texts), texts, bundle.tokenizer.length)
    wanted = _torch_texts(source, texts)
    checks += [compare("text", repr(t[:40]), a[None], b[None]) for t, a, b in zip(texts, bundle.encode_text(texts), wanted)]
    golden = [drawn_picture(w, h, i) for i, (w, h) in enumerate(GOLDEN_SIZES)]
    names = [f"picture-{i}.png" for i in range(len(golden))]
    for name, picture in zip(names, golden):
        picture.save(folder / "golden" / name)
    write_json(
        folder / GOLDEN,
        {
            "pictures": names,
            "texts": list(GOLDEN_TEXTS),
            "ids": source.tokenizer.ids(GOLDEN_TEXTS),
            "image_embeddings": _torch_images(source, preprocess, golden).tolist(),
            "text_embeddings": _torch_texts(source, GOLDEN_TEXTS).tolist(),
        },
    )
    return checks


def _check_language(source: Source, folder: Path) -> tuple[dict[str, Any], list[Check]]:
    """(golden vectors, checks) of whole texts."""
    bundle = open_any_bundle(folder, verify=False)
    assert isinstance(bundle, LanguageBundle)
    texts = list(GOLDEN_TEXTS)
    rows = bundle.tokenizer.rows(texts)
    _check_ids(source, rows, texts, bundle.tokenizer.length)
    last = []
    for row in rows:
        with torch.no_grad():
            logits = source.parts["decoder"].module(torch.tensor([row]))
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        last.append(logits[0, -1].float().numpy())
    golden = {"texts": texts, "ids": rows, "last_logits": [row.tolist() for row in last]}
    ours = [bundle.logits(np.asarray([row]))[0, -1] for row in rows]
    return golden, [compare("text", repr(t), a[None], b[None]) for t, a, b in zip(texts, ours, last)]


def _check_ids(source: Source, rows: Sequence[Sequence[int]], texts: Sequence[str], length: int) -> None:
    """The runtime's ids are the training's. Raises GateFailed."""
    for text, row in zip(texts, rows):
        ids, mask = source.tokenizer.encode([text], length)
        if ids[0][mask[0]].tolist() != list(row):
            raise GateFailed(f"the runtime's tokenizer gives other ids for {text[:40]!r}", remedy="nothing was published")


def _torch_images(source: Source, preprocess: Preprocess, pictures: Sequence[Image.Image]) -> np.ndarray:
    """[n, E] unit rows by Pillow's preprocessing and the torch module."""
    pixels = preprocess.normalise(np.stack([preprocess.to_array(p) for p in pictures]))
    with torch.no_grad():
        return normalise(source.parts["vision"].module(torch.from_numpy(pixels)).float().numpy())


def _torch_texts(source: Source, texts: Sequence[str]) -> np.ndarray:
    """[n, E] unit rows, padded to the full length as in training."""
    part = source.parts["text"]
    ids, mask = source.tokenizer.encode(list(texts), source.length)
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    with torch.no_grad():
        return normalise(part.module(*(given[name] for name in part.inputs)).float().numpy())


def _signature(path: Path) -> dict[str, Any]:
    from vlm.runtime.session import open_session

    session = open_session(path)
    return {
        "inputs": {i.name: f"{i.type[7:-1]} {i.shape}".replace("'", "") for i in session.get_inputs()},
        "outputs": {o.name: f"{o.type[7:-1]} {o.shape}".replace("'", "") for o in session.get_outputs()},
    }


def _version(package: str) -> str | None:
    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
