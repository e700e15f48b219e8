"""What a bundle says of itself to a person: the model card and the example."""

from __future__ import annotations

from typing import Any

EXAMPLE_DUAL = '''"""Which text fits the picture? Run: python example.py picture.png "a red circle" "a blue square"

Needs numpy, onnxruntime, tokenizers and pillow.
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer

here = Path(__file__).parent
about = json.loads((here / "bundle.json").read_text())
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.enable_truncation(about["text"]["length"])
tokenizer.enable_padding(pad_id=about["text"]["pad_id"], length=about["text"]["length"], direction=about["text"]["padding_side"])
preprocess, vision, text = (InferenceSession(here / about["graphs"][name]["path"]) for name in ("preprocess", "vision", "text"))

picture, *texts = sys.argv[1:] or [here / "golden" / "picture-0.png", "a red circle", "a blue square"]
pixels = preprocess.run(None, {"picture": np.asarray(Image.open(picture).convert("RGB"))})[0]
image = vision.run(None, {"pixel_values": pixels[None]})[0]
rows = tokenizer.encode_batch(texts)
feed = {"input_ids": [r.ids for r in rows], "attention_mask": [r.attention_mask for r in rows]}
names = {i.name for i in text.get_inputs()}
words = text.run(None, {name: np.array(value, np.int64) for name, value in feed.items() if name in names})[0]
unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, words)]
for score, line in sorted(zip((unit[0] @ unit[1].T)[0].tolist(), texts), reverse=True):
    print(f"{score:.4f}  {line}")
'''

EXAMPLE_LANGUAGE = '''"""Continue a text greedily. Run: python example.py "the colour of" 20

Needs numpy, onnxruntime and tokenizers.
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

here = Path(__file__).parent
about = json.loads((here / "bundle.json").read_text())
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
decoder = InferenceSession(here / about["graphs"]["decoder"]["path"])
text, steps = (sys.argv[1:] + ["a", "20"][len(sys.argv) - 1 :])[:2]
ids = tokenizer.encode(text).ids
if ids[-1:] == [about["text"]["eos_id"]]:
    ids.pop()
for _ in range(int(steps)):
    logits = decoder.run(None, {"input_ids": np.array([ids[-about["text"]["length"] :]], np.int64)})[0]
    ids.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(ids))
'''


def card(about: dict[str, Any]) -> str:
    """README.md of a bundle, in Markdown with the YAML header of a model card."""
    dual = about["kind"] == "dual-encoder"
    task = "zero-shot-image-classification" if dual else "text-generation"
    lines = [
        "---",
        "library_name: onnx",
        f"pipeline_tag: {task}",
        "tags:",
        "- onnx",
        "- vlm-forge",
        "---",
        f"# {about['name']}",
        "",
        f"An ONNX bundle of a {about['kind']} model, complete by itself: graphs, tokenizer"
        + (", preprocessing inside a graph" if dual else "")
        + " and golden vectors on drawn pictures and texts.",
        "",
        "| graph | inputs | outputs |",
        "| --- | --- | --- |",
    ]
    for name, graph in about["graphs"].items():
        inputs = ", ".join(f"`{k}` {v}" for k, v in graph["inputs"].items())
        outputs = ", ".join(f"`{k}` {v}" for k, v in graph["outputs"].items())
        lines.append(f"| `{graph['path']}` ({name}) | {inputs} | {outputs} |")
    lines += ["", f"Opset {about['opset']}. Every file's sha256 is in `bundle.json`."]
    worst = min(about["parity"], key=lambda c: c["cosine"])
    lines += [
        "",
        f"Compared with the model it was exported from in {len(about['parity'])} checks: least cosine "
        f"{worst['cosine']:.7f} ({worst['part']}, {worst['case']}).",
        "",
        "## Use",
        "",
        "```",
        "python example.py",
        "vlm embed DIR --images - < paths.txt" if dual else "vlm evaluate DIR --task perplexity --data texts.jsonl",
        *(["vlm serve DIR"] if dual else []),
        "```",
        "",
    ]
    if dual:
        e = about["embedding"]
        lines += [
            f"Embeddings have {e['width']} numbers. The graphs give them unscaled: divide by their length. The score of a "
            f"picture and a text is {e['scale']:.6g} * cosine"
            + (f" {e['bias']:+.6g}" if e["bias"] else "")
            + f"; scores become probabilities by {e['form']}"
            + (" over the texts." if e["form"] == "softmax" else ", each alone."),
            "",
        ]
    return "\n".join(lines)
