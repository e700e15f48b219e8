"""A model that writes by look-up: it sees the colour of a picture and answers what its table says.

Its logits favour the table's answer, token by token, over a small vocabulary of words; all else is equally likely.
"""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
from PIL import Image

from vlm.runtime.chat import PicturePart, Template
from vlm.runtime.generation import Prompt

PAD, EOS, IMAGE = 0, 1, 2
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (255, 255, 255)}
WORDS = (*COLOURS, "yes", "Yes", "no", "a", "an", "picture", "plain", "circle", "is", "there", "what", "color", "describe", "the", "it")
SURE = 6.0


class ColourGenerator:
    """mistakes: colour seen -> colour said. blind: the colour it says without a picture. caption: of a colour."""

    name = "colours"
    length = 48
    eos_ids = frozenset({EOS})

    def __init__(self, mistakes=None, blind="red", caption="a {} picture"):
        self.template = Template("plain", bos=False)
        self.mistakes, self.blind, self.caption = mistakes or {}, blind, caption
        self.vocabulary = ["", "", "", *WORDS]
        self.vocab_size = len(self.vocabulary)
        self.prepared = 0

    def encode(self, text):
        plain = "".join(c if c.isalnum() else " " for c in text)
        return [self.vocabulary.index(w if w in self.vocabulary else w.lower()) for w in plain.split()]

    def text(self, ids):
        return " ".join(self.vocabulary[i] for i in ids if self.vocabulary[i])

    def prepare_image(self, picture, limits=None):
        self.prepared += 1
        pixels = np.asarray(picture.convert("RGB").resize((2, 2)), dtype=np.float32)
        return {"image": pixels.transpose(2, 0, 1)}

    def prompt(self, messages, pictures):
        ids = []
        for message in messages:
            for part in message.content:
                ids += [IMAGE] if isinstance(part, PicturePart) else self.encode(part)
        assert ids.count(IMAGE) == len(pictures)
        return Prompt(tuple(ids), {"image": [p["image"] for p in pictures]} if pictures else {})

    def positions(self, prompt):
        """A picture takes 4 positions."""
        return len(prompt.ids) + 3 * list(prompt.ids).count(IMAGE)

    def colour(self, prompt):
        if not prompt.pictures:
            return self.blind
        seen = prompt.pictures["image"][0].mean((1, 2))
        nearest = min(COLOURS, key=lambda name: np.abs(seen - COLOURS[name]).sum())
        return self.mistakes.get(nearest, nearest)

    def answer(self, prompt):
        asked = self.text(prompt.ids).split()
        colour = self.colour(prompt)
        if asked[:2] == ["is", "there"]:
            return self.encode("yes" if colour in asked else "no")
        return self.encode(colour if asked[:1] == ["what"] else self.caption.format(colour))

    def logits(self, prompt, step):
        out = np.zeros(self.vocab_size, dtype=np.float32)
        out[[*self.answer(prompt), EOS][min(step, len(self.answer(prompt)))]] = SURE
        return out

    def stepper(self):
        return ColourStepper(self)

    def nats(self, prompts, answers):
        out = []
        for prompt, answer in zip(prompts, answers, strict=True):
            rows = np.stack([self.logits(prompt, t) for t in range(len(self.encode(answer)) + 1)]).astype(np.float64)
            ids = [*self.encode(answer), EOS]
            out.append(np.log(np.exp(rows).sum(1)) - rows[np.arange(len(ids)), ids])
        return out


class ColourStepper:
    def __init__(self, generator):
        self.generator, self.vocab_size, self.step = generator, generator.vocab_size, 0

    def start(self, prompts):
        self.prompts = list(prompts)
        return self._logits()

    def advance(self, ids):
        assert ids.shape == (len(self.prompts),)
        self.step += 1
        return self._logits()

    def reorder(self, index):
        self.prompts = [self.prompts[i] for i in index]

    def _logits(self):
        return np.stack([self.generator.logits(p, self.step) for p in self.prompts])


def picture_fields(i, colour):
    """Of the i-th picture: asked for its colour, and whether its own or another colour is there."""
    other = [c for c in COLOURS if c != colour][i % 3]
    return {
        "caption": f"a {colour} picture",
        "concept": colour,
        "objects": [colour],
        "questions": [
            {"kind": "color", "question": "What color is it?", "answer": colour},
            {"kind": "exists", "question": f"Is there {colour}?", "answer": "yes"},
            {"kind": "exists", "question": f"Is there {other}?", "answer": "no"},
        ],
    }


def colour_shard(path, count=24, fields=picture_fields):
    """A tar shard of plain pictures, their colours in turn."""
    names = list(COLOURS)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            colour = names[i % len(names)]
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), COLOURS[colour]).save(picture, "PNG")
            for extension, data in (("png", picture.getvalue()), ("json", json.dumps(fields(i, colour)).encode())):
                member = tarfile.TarInfo(f"{i:03d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)
