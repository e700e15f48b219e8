"""The parts of a bundle that only a model of pictures alone has: what it says of itself, golden vectors, checks.

n pictures, E width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm.export.drawings import GOLDEN_SIZES, ODD_SIZES, drawn_picture
from vlm.export.parity import Check, compare
from vlm.export.source import Source
from vlm.runtime.bundle import open_any_bundle
from vlm.runtime.embedder import normalise
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.vision import VisionBundle


def described(source: Source, preprocess: Preprocess) -> dict[str, Any]:
    """Tables of bundle.json."""
    vision = source.parts["vision"]
    with torch.no_grad():
        first = vision.module(*vision.inputs.values())
    embedding = first[0] if isinstance(first, tuple) else first
    return {
        "embedding": {"width": int(embedding.shape[-1])},
        "head": {"classes": list(getattr(source.model, "classes", ()))},
        "picture": {"size": preprocess.size, "resize": preprocess.resize, "interpolation": preprocess.interpolation},
    }


def check(source: Source, preprocess: Preprocess, folder: Path) -> tuple[dict[str, Any], list[Check]]:
    """(golden vectors, checks of pictures of odd sizes from the decoded picture on); writes the golden pictures."""
    bundle = open_any_bundle(folder, verify=False)
    assert isinstance(bundle, VisionBundle)
    drawn = [drawn_picture(w, h, i) for i, (w, h) in enumerate(ODD_SIZES)]
    wanted = _torch(source, preprocess, drawn)
    got = [bundle.encode_image(drawn)] + ([normalise(bundle.classify(drawn))] if bundle.classes else [])
    checks = []
    for ours, theirs in zip(got, wanted):
        checks += [compare("picture", f"{p.width} x {p.height}", a[None], b[None]) for p, a, b in zip(drawn, ours, normalise(theirs))]
    golden = [drawn_picture(w, h, i) for i, (w, h) in enumerate(GOLDEN_SIZES)]
    names = [f"picture-{i}.png" for i in range(len(golden))]
    for name, picture in zip(names, golden):
        picture.save(folder / "golden" / name)
    vectors = _torch(source, preprocess, golden)
    out: dict[str, Any] = {"pictures": names, "image_embeddings": normalise(vectors[0]).tolist()}
    if bundle.classes:
        out["logits"] = vectors[1].tolist()
    return out, checks


def _torch(source: Source, preprocess: Preprocess, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    """Outputs of the torch module, [n, E] and with a head [n, K], by Pillow's preprocessing."""
    pixels = preprocess.normalise(np.stack([preprocess.to_array(p) for p in pictures]))
    with torch.no_grad():
        out = source.parts["vision"].module(torch.from_numpy(pixels))
    return [t.float().numpy() for t in (out if isinstance(out, tuple) else (out,))]
