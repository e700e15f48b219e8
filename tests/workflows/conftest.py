"""Pictures of two colours side by side, and claims on them that train in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 230),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
    "yellow": (230, 230, 30),
}

CLAIM = """\
schema = 1
extends = "{extends}"

[method]
key = "toy-{extends}"

[claim]
metric = "retrieval.image_to_text.r@10"
margin = {margin}
seeds = 2
data = "{folder}/train.jsonl"
test = "{folder}/test.jsonl"
tune = {{ factors = {factors}, share = 0.5, dev = 0.2 }}
{more}

[claim.overrides]
model.embed_dim = 32
model.vision = {{ width = 32, depth = 1, heads = 1, image_size = 16, patch_size = 8 }}
model.text = {{ width = 32, depth = 1, heads = 1, length = 8 }}
train = {{ steps = {steps}, batch_size = 32, checkpoint_every = 2 }}
optimizer = {{ lr = 3e-3 }}
scale = {{ threads = 1 }}
"""


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """train.jsonl (8 pictures of each of 36 concepts) and test.jsonl (3 of each): `caption` and `concept` name the colours."""
    folder = tmp_path_factory.mktemp("two-colours")
    for name, copies, seed in (("train", 8, 0), ("test", 3, 1)):
        (folder / name).mkdir()
        generator, rows = np.random.default_rng(seed), []
        for left, first in COLOURS.items():
            for right, second in COLOURS.items():
                for copy in range(copies):
                    pixels = np.zeros((16, 16, 3))
                    pixels[:, :8], pixels[:, 8:] = first, second
                    pixels = np.clip(pixels + generator.normal(0, 25, pixels.shape), 0, 255).astype(np.uint8)
                    file = f"{name}/{left}-{right}-{copy}.png"
                    Image.fromarray(pixels).save(folder / file)
                    rows.append({"image": file, "caption": f"{left} {right}", "concept": f"{left} {right}"})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture
def make_claim(pictures, tmp_path):
    """A preset file with a claim: make_claim(steps=4, factors=[1.0], margin=2.0, more="...")."""

    def make(name="toy", *, extends="siglip-tiny", steps=4, factors=(1.0,), margin=2.0, more=""):
        path = tmp_path / f"{name}.toml"
        path.write_text(
            CLAIM.format(extends=extends, steps=steps, factors=list(factors), margin=margin, more=more, folder=pictures.as_posix())
        )
        return str(path)

    return make


@pytest.fixture
def make_workspace(tmp_path):
    """A workspace whose store and results outlive it, as on disk."""
    from vlm.workflows.reproduce.store import Results
    from vlm.workflows.reproduce.workspace import Workspace

    def make(**settings):
        notes = []
        made = Workspace(tmp_path / "store", Results(tmp_path / "results"), "vlm reproduce toy", notes.append, **settings)
        made.notes = notes
        return made

    return make
