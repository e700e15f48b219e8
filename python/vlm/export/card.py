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

EXAMPLE_VISION = '''"""What does the model see? Run: python example.py picture.png

Needs numpy, onnxruntime and pillow.
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image

here = Path(__file__).parent
about = json.loads((here / "bundle.json").read_text())
preprocess, vision = (InferenceSession(here / about["graphs"][name]["path"]) for name in ("preprocess", "vision"))

path = (sys.argv[1:] or [here / "golden" / "picture-0.png"])[0]
pixels = preprocess.run(None, {"picture": np.asarray(Image.open(path).convert("RGB"))})[0]
embedding, *logits = vision.run(None, {"pixel_values": pixels[None]})
if logits:
    chances = np.exp(logits[0][0] - logits[0].max())
    for chance, name in sorted(zip((chances / chances.sum()).tolist(), about["head"]["classes"]), reverse=True)[:5]:
        print(f"{chance:.4f}  {name}")
else:
    print(embedding[0].tolist())
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

EXAMPLE_ANSWER = '''"""Ask about a picture. Run: python example.py picture.png "what is this?" 20

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
shape, special, template = about["decoder"], about["text"], about["template"]
graphs = {name: InferenceSession(here / graph["path"]) for name, graph in about["graphs"].items()}
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
path, question, steps = (sys.argv[1:] + [here / "golden" / "picture-0-0.png", "what is this?", "20"][len(sys.argv) - 1 :])[:3]

user, first = template["user"], [special["bos_id"]] if template["bos"] and special["bos_id"] is not None else []
system = [template["system"]["prefix"], template["default_system"], template["system"]["suffix"]] if template["default_system"] else []
before = [*system, user["prefix"], template["before_picture"]]
after = [template["after_picture"], question, user["suffix"], template["assistant"]["prefix"]]
start, end = ([i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids] for texts in (before, after))
embed = lambda ids: graphs["embed"].run(None, {"input_ids": np.array([ids], np.int64)})[0]
picture = np.asarray(Image.open(path).convert("RGB"))
pixels = {s["input"]: graphs[s["graph"]].run(None, {"picture": picture})[0][None] for s in about["pictures"]["streams"].values()}
x = np.concatenate([embed(first + start), graphs["vision"].run(None, pixels)[0], embed(end)], axis=1)

empty = np.zeros((1, shape["kv_heads"], 0, shape["head_width"]), np.float32)
past = [empty] * (2 * shape["layers"])
names = [f"past_key_values.{layer}.{kind}" for layer in range(shape["layers"]) for kind in ("key", "value")]
answer, total = [], 0
while len(answer) < int(steps) and (not answer or answer[-1] not in special["eos_ids"]):
    new, total = np.arange(total, total + x.shape[1])[None], total + x.shape[1]
    feed = {"inputs_embeds": x, "attention_mask": np.ones((1, total), np.int64), "position_ids": new}
    logits, *past = graphs["decoder"].run(None, feed | dict(zip(names, past)))
    answer.append(int(logits[0].argmax()))
    x = embed(answer[-1:])
print(tokenizer.decode(answer))
'''

EXAMPLE_RUNTIME = '''"""Ask about a picture. Run: python example.py picture.png "what is this?" 20

Needs vlm-forge, which needs no torch for this: the layers of this model hold different numbers of positions, pictures are
cut into tiles, or they stand beside the text, and its runtime does that work.
"""

import sys
from pathlib import Path

from vlm.runtime import open_any_bundle
from vlm.runtime.chat import Message
from vlm.runtime.generation import Decoding, generate

here = Path(__file__).parent
path, question, steps = (sys.argv[1:] + [here / "golden" / "picture-0-0.png", "what is this?", "20"][len(sys.argv) - 1 :])[:3]
bundle = open_any_bundle(here)
prompt = bundle.prompt([Message("user", (question,))], [bundle.prepare_image(path)])
print(generate(bundle, [prompt], Decoding(max_new_tokens=int(steps)))[0].text)
'''


def example(about: dict[str, Any]) -> str:
    """example.py of a bundle."""
    if about["kind"] == "dual-encoder":
        return EXAMPLE_DUAL
    if about["kind"] == "vision":
        return EXAMPLE_VISION
    if about["kind"] == "language":
        return EXAMPLE_LANGUAGE
    decoder = about["decoder"]
    runtime = decoder.get("cross") or decoder.get("drops") or about["pictures"].get("tiling")
    return EXAMPLE_RUNTIME if runtime else EXAMPLE_ANSWER


_TASKS = {
    "dual-encoder": "zero-shot-image-classification", "language": "text-generation", "vision": "image-classification",
    "vision-language": "image-text-to-text",
}
_USES = {
    "dual-encoder": ["vlm embed DIR --images - < paths.txt", "vlm serve DIR"],
    "language": ["vlm evaluate DIR --task perplexity --data texts.jsonl"],
    "vision": ["vlm embed DIR --images - < paths.txt"],
    "vision-language": ['vlm generate DIR --image picture.png --prompt "what is this?"', "vlm serve DIR"],
}


def card(about: dict[str, Any]) -> str:
    """README.md of a bundle, in Markdown with the YAML header of a model card."""
    kind = about["kind"]
    dual = kind == "dual-encoder"
    uses = list(_USES[kind])
    if kind == "vision" and about["head"]["classes"]:
        uses.append("vlm predict DIR picture.png")
    if kind == "language" and "decoder" in about:
        uses += ['vlm generate DIR --prompt "the colour of"', "vlm serve DIR"]
    lines = [
        "---",
        "library_name: onnx",
        f"pipeline_tag: {_TASKS[kind]}",
        "tags:",
        "- onnx",
        "- vlm-forge",
        "---",
        f"# {about['name']}",
        "",
        f"An ONNX bundle of a {kind} model, complete by itself: graphs"
        + (", tokenizer" if kind != "vision" else "")
        + (", preprocessing inside a graph" if kind != "language" else "")
        + {"dual-encoder": " and golden vectors on drawn pictures and texts.", "vision": " and golden vectors on drawn pictures."}.get(
            kind, " and golden answers."
        ),
        "",
        "| graph | inputs | outputs |",
        "| --- | --- | --- |",
    ]
    for name, graph in about["graphs"].items():
        inputs, outputs = (", ".join(f"`{k}` {v}" for k, v in _short(graph[side]).items()) for side in ("inputs", "outputs"))
        lines.append(f"| `{graph['path']}` ({name}) | {inputs} | {outputs} |")
    lines += ["", f"Opset {about['opset']}. Every file's sha256 is in `bundle.json`."]
    worst = min(about["parity"], key=lambda c: c["cosine"])
    lines += [
        "",
        f"Compared with the model it was exported from in {len(about['parity'])} checks: least cosine "
        f"{worst['cosine']:.7f} ({worst['part']}, {worst['case']}).",
        "",
        *_of_quantised(about.get("quantised")),
        "## Use",
        "",
        "```",
        "python example.py",
        *uses,
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
    if "decoder" in about:
        lines += [
            f"Prompt and answer have {about['text']['length']} positions together"
            + (f"; a picture takes {about['pictures']['positions']}." if "pictures" in about else ".")
            + f" Messages become text by the template `{about['template']['name']}`, which is in `bundle.json`. The decoder "
            "takes the keys and values that it gave before, at first those of no position.",
            "",
        ]
    return "\n".join(lines)


def _of_quantised(quantised: dict[str, Any] | None) -> list[str]:
    if quantised is None:
        return []
    graphs = ", ".join(f"`{name}`" for name in quantised["graphs"])
    same = "" if "same_token" not in quantised else f"; the best token is the same in {quantised['same_token']:.0%} of the steps"
    return [
        f"That was its float form. Since then the products of {graphs} have int8 weights: least cosine "
        f"{quantised['least_cosine']:.5f} with what the float form says of drawn pictures, texts and prompts{same}.",
        "",
    ]


def _short(values: dict[str, str]) -> dict[str, str]:
    """The keys and values of all layers but the first left out."""
    caches = ("past_key_values.", "present.")
    return {name: shape for name, shape in values.items() if not name.startswith(caches) or name.split(".")[1] == "0"}
