"""A bundle with int8 weights: a quarter of the size, faster where the CPU multiplies int8, and how far it strays is measured.

Weights are int8, a scale a column; activations uint8, a scale a call (onnxruntime's dynamic quantisation), so that a row hangs a
little on the rows beside it. Weights take 7 bits: CPUs that add products of bytes in 16 bits (AVX2, AVX-512 without VNNI) never
saturate.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config.errors import CheckpointError, GateFailed, RequestError
from vlm.export import card as cards
from vlm.export.drawings import GOLDEN_TEXTS, ODD_SIZES, drawn_picture
from vlm.export.files import files_of, write_json
from vlm.export.generative import STEPS, golden_answer
from vlm.export.graphs import quiet
from vlm.export.parity import Check, Tolerance, compare
from vlm.export.publish import check_target, publishing
from vlm.runtime.bundle import AnyBundle, Bundle, open_any_bundle
from vlm.runtime.generator import BundleGenerator
from vlm.runtime.manifest import GOLDEN, MANIFEST, read_json, read_manifest
from vlm.runtime.vision import VisionBundle

PRODUCTS = ("MatMul", "Gemm")
QUANTISED = "MatMulInteger"
TOLERANCE = Tolerance(cosine=0.999, max_abs=0.05, picture_cosine=0.999, nats=0.2)
"""How near another machine must come to the golden answers of this one: where a number is rounded to 8 bits, a last bit of
float32 may move it by a level."""
NEAR = 0.3
"""Two best logits nearer than this may change places: a golden answer ends before."""

def quantise_bundle(bundle: str | Path, output: str | Path, *, least_cosine: float = 0.99) -> dict[str, Any]:
    """An int8 copy of a float bundle at `output`; an older bundle there is replaced. Returns the report: kind, bytes before
    and after, checks, least cosine; of a bundle that writes `same_token`, the share of steps with the same best token.

    Compared are embeddings of drawn pictures and golden texts, or logits after golden prompts and their answers, each with
    what the float bundle says. Raises RequestError (an int8 bundle, a bundle of no use to this, `output` is the bundle),
    CheckpointError (a damaged bundle), GateFailed below `least_cosine`: then nothing is written.
    """
    directory, output = Path(bundle), Path(output)
    check_target(output)
    if output.absolute().resolve() == directory.absolute().resolve():
        raise RequestError("would overwrite the bundle that it is made from", where=str(output), remedy="choose another --output")
    manifest = read_manifest(directory)
    if "quantised" in manifest.data:
        raise RequestError("has int8 weights already", where=str(directory), remedy="give the float bundle")
    before = open_any_bundle(directory)
    pictures = {entry.get("graph") for entry in (manifest.data.get("pictures") or {}).get("streams", {}).values()} | {"preprocess"}
    with publishing(output) as folder:
        shutil.copytree(directory, folder, dirs_exist_ok=True)
        changed = [n for n, graph in manifest.graphs.items() if n not in pictures and _quantise(folder / graph["path"])]
        if not changed:
            raise RequestError("has no products of weights to quantise", where=str(directory))
        about = dict(manifest.data) | {"tolerance": asdict(TOLERANCE)}
        about["quantised"] = {"type": "int8", "graphs": changed}
        about["files"] = files_of(folder)
        write_json(folder / MANIFEST, about)
        after = open_any_bundle(folder, verify=False)
        checks, same = compare_bundles(before, after)
        _require(checks, least_cosine)
        least = min(check.cosine for check in checks)
        about["quantised"] |= {"least_cosine": least, "bytes_before": _bytes(manifest.data), "checks": [c.as_dict() for c in checks]}
        if same is not None:
            about["quantised"]["same_token"] = same
        write_json(folder / GOLDEN, _golden(after, read_json(folder / GOLDEN)))
        (folder / "README.md").write_text(cards.card(about), encoding="utf-8")
        about["files"] = files_of(folder)
        write_json(folder / MANIFEST, about)
        open_any_bundle(folder).self_test()
    report = {
        "output": str(output), "kind": about["kind"], "name": about["name"], "opset": about["opset"], "graphs": changed,
        "bytes": _bytes(about), "bytes_before": _bytes(manifest.data), "checks": len(checks), "least_cosine": least,
        "expected": least_cosine,
    }  # fmt: skip
    return report if same is None else report | {"same_token": same}


def compare_bundles(before: AnyBundle, after: AnyBundle) -> tuple[list[Check], float | None]:
    """(checks of what both say, the share of steps with the same best token where they write)."""
    pictures = [drawn_picture(width, height, number) for number, (width, height) in enumerate(ODD_SIZES)]
    checks: list[Check] = []
    for kind in (Bundle, VisionBundle):
        if isinstance(before, kind) and isinstance(after, kind):
            checks += _rows("picture", [f"{p.width} x {p.height}" for p in pictures], after.encode_image(pictures), before.encode_image(pictures))
    if isinstance(before, Bundle) and isinstance(after, Bundle):
        texts = [*GOLDEN_TEXTS, "a photo of a dog", "Grüße, 你好 🙂", "a very long text " * 50]
        checks += _rows("text", [repr(t[:40]) for t in texts], after.encode_text(texts), before.encode_text(texts))
    if isinstance(before, VisionBundle) and isinstance(after, VisionBundle) and before.classes:
        checks += _rows("logits", [f"{p.width} x {p.height}" for p in pictures], after.classify(pictures), before.classify(pictures))
    if not isinstance(before, BundleGenerator) or not isinstance(after, BundleGenerator) or not before.writes:
        return checks, None
    found, same = _steps(before, after, read_json(before.directory / GOLDEN).get("prompts", []))
    return checks + found, same


def _steps(before: BundleGenerator, after: BundleGenerator, cases: Sequence[Any]) -> tuple[list[Check], float]:
    """Logits after the golden prompts, and after each token of the float bundle's own answers."""
    checks, agreed = [], []
    for case in cases:
        prompt = before.golden_prompt(case)
        steppers = before.stepper(), after.stepper()
        logits = [stepper.start([prompt]) for stepper in steppers]
        for step in range(min(STEPS, before.length - before.positions(prompt))):
            checks.append(compare("prompt.logits", f"{case['text']!r}, token {step}", logits[1], logits[0]))
            agreed.append(bool(logits[0].argmax() == logits[1].argmax()))
            ids = logits[0].argmax(1).astype(np.int64)
            if int(ids[0]) in before.eos_ids or before.positions(prompt) + step + 1 >= before.length:
                break
            logits = [stepper.advance(ids) for stepper in steppers]
    return checks, float(np.mean(agreed)) if agreed else 1.0


def _golden(bundle: AnyBundle, golden: dict[str, Any]) -> dict[str, Any]:
    """The same pictures, texts and prompts with what this bundle says of them."""
    out = dict(golden)
    if isinstance(bundle, Bundle | VisionBundle):
        pictures = [bundle.directory / "golden" / name for name in golden["pictures"]]
        out["image_embeddings"] = bundle.encode_image(pictures).tolist()
        if isinstance(bundle, Bundle):
            out["text_embeddings"] = bundle.encode_text(golden["texts"]).tolist()
        elif "logits" in golden:
            out["logits"] = bundle.classify(pictures).tolist()
    if "last_logits" in golden:
        language: Any = bundle
        out["last_logits"] = [language.logits(np.asarray([ids]))[0, -1].tolist() for ids in golden["ids"]]
    if "prompts" in golden and isinstance(bundle, BundleGenerator):
        out["prompts"] = [_answered(bundle, case) for case in golden["prompts"]]
    return out


def _answered(bundle: BundleGenerator, case: Any) -> dict[str, Any]:
    prompt = bundle.golden_prompt(case)
    answer = golden_answer(bundle, prompt, NEAR)
    return dict(case) | {"answer": answer, "nats": bundle.nats([prompt], [answer])[0].tolist()}


def _rows(part: str, cases: Sequence[str], ours: np.ndarray, theirs: np.ndarray) -> list[Check]:
    return [compare(part, case, a[None], b[None]) for case, a, b in zip(cases, ours, theirs, strict=True)]


def _require(checks: Sequence[Check], least_cosine: float) -> None:
    worst = min(checks, key=lambda check: check.cosine if check.cosine == check.cosine else -2.0)
    if not worst.cosine >= least_cosine:
        failed = sum(not check.cosine >= least_cosine for check in checks)
        raise GateFailed(
            f"with int8 weights the {worst.part} of {worst.case} has cosine {worst.cosine:.5f} with what the float bundle says, "
            f"expected {least_cosine}; {failed} of {len(checks)} checks failed",
            remedy="nothing was published; keep the float bundle, or accept less with --least-cosine and measure it with vlm evaluate",
        )


def _quantise(path: Path) -> bool:
    """Replaces a graph by its int8 form. False if it has no product of weights."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    beside = [p for p in path.parent.glob(f"{path.name}*") if p != path]  # weights beyond 2 GB lie in a file of their own
    logger = logging.getLogger()
    level = logger.level
    with tempfile.TemporaryDirectory(dir=path.parent) as place, quiet():
        made = Path(place) / path.name
        logger.setLevel(logging.ERROR)  # it advises preparations that change nothing here
        try:
            graph = onnx.load(path)
            graph.graph.ClearField("value_info")  # shapes that the exporter wrote before it folded constants need not hold
            quantize_dynamic(
                graph, made, op_types_to_quantize=list(PRODUCTS), per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
                use_external_data_format=bool(beside),
            )  # fmt: skip
        except Exception as error:  # onnx and onnxruntime raise many types
            raise CheckpointError(f"cannot be quantised: {str(error)[:300]}", where=str(path)) from error
        finally:
            logger.setLevel(level)
        if not any(node.op_type == QUANTISED for node in onnx.load(made, load_external_data=False).graph.node):
            return False
        for old in beside:
            old.unlink()
        for new in Path(place).iterdir():
            shutil.move(new, path.parent / new.name)
    return True


def _bytes(about: Any) -> int:
    return sum(entry["bytes"] for entry in about["files"].values())
