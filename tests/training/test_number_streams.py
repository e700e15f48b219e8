"""Columns of numbers, all the way into a run: what a file says of its samples and tokens changes what is learned."""

from __future__ import annotations

import json

import pytest
import torch

from tests.data.talk_makers import write_talks
from tests.training.test_resume import begin, digest
from vlm.data.tokenizer import Tokenizer
from vlm.models import load_model
from vlm.training.preset import load_preset
from vlm.training.run import Run
from vlm.types import Batch, TokenIds

COLORS = ("red", "green", "blue", "grey", "old", "new")

LM = """
schema = 1
[method]
key = "weighed"
title = "a language model of two sorts of documents"
command = "pretrain"
[model]
kind = "language"
width = 32
depth = 1
heads = 2
ffn_width = 64
length = 32
[tokenizer]
kind = "bpe"
vocab_size = 300
[data]
source = "{source}"
[data.packer]
kind = "concat"
length = 32
{stream}
[[objectives]]
name = "next-token"
kind = "token-ce"
{weights}
[optimizer]
lr = 1e-2
[train]
steps = 40
batch_size = 8
checkpoint_every = 100
[scale]
threads = 1
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """24 pictures with captions: every second one is noise; `fit` has a number a caption."""
    entries = []
    for n in range(24):
        captions = [f"a {COLORS[n % 6]} thing", f"thing number {n}"]
        entries.append({"image": f"{n % 12}.png", "caption": captions, "one": 1.0, "none": 0.0, "noise": n % 2, "fit": [0.75, 0.25]})
    return write_talks(tmp_path_factory.mktemp("pairs"), entries, "pairs.jsonl")


@pytest.fixture(scope="module")
def losses(pairs, tmp_path_factory):
    """Settings of the toy -> its losses over 3 updates; the same settings run once."""
    known = {}

    def run(*settings):
        if settings not in known:
            output = tmp_path_factory.mktemp("run") / "out"
            table = [f'data.source="{pairs}"', 'data.val="!delete"', 'data.group_by="!delete"', "train.steps=3", *settings]
            begin(output, *table).train()
            known[settings] = [line["train/loss"] for line in digest(output)[1]]
        return known[settings]

    return run


def number(column, **more):
    return f'data.streams={{n={json.dumps({"kind": "numbers", "column": column, **more}).replace(": ", " = ")}}}'


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_weights_of_a_column_reach_the_loss(losses, form):
    own = [f"objectives.contrastive.form={form}", "objectives.contrastive.temperature=own"]
    weighed = [*own, "objectives.contrastive.weights=n"]
    assert losses(*weighed, number("one")) == losses(*own)
    halved = losses(*weighed, number("noise"))
    assert halved != losses(*own)
    assert all(loss == loss for loss in halved)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_smoothing_by_a_column_reaches_the_loss(losses, form):
    own = [f"objectives.contrastive.form={form}", "objectives.contrastive.temperature=own"]
    smooth = [*own, "objectives.contrastive.smoothing=0.3", "objectives.contrastive.smooth_by=n"]
    assert losses(*smooth, number("none")) == pytest.approx(losses(*own), rel=1e-5)
    assert losses(*smooth, number("one", scale=-1, offset=1)) == pytest.approx(losses(*own), rel=1e-5)
    by_sample, plain = losses(*smooth, number("noise")), losses(*own)
    assert by_sample[0] != pytest.approx(plain[0], rel=1e-4)
    if form == "softmax":
        alike = losses(*own, "objectives.contrastive.smoothing=0.3")
        assert losses(*smooth, number("one")) == pytest.approx(alike, rel=1e-5)
        assert by_sample[0] != pytest.approx(alike[0], rel=1e-4)


def test_shares_of_a_column_reach_the_loss(losses):
    several = 'data.captions={kind="several", k=2}'
    multi = losses(several, "objectives.contrastive.targets=multi")
    listed = [several, "objectives.contrastive.targets=listed", "objectives.contrastive.shares=n"]
    alike = number("nowhere", each="caption", missing=0.5)  # equal shares of both captions
    assert losses(*listed, alike) == pytest.approx(multi, rel=1e-5)
    assert losses(*listed, number("fit", each="caption"))[0] != pytest.approx(multi[0], rel=1e-4)


def language(tmp_path, stream="", weights=""):
    """Greedy words after "the sky is" of a model trained on documents that say green twice as often as blue."""
    source = tmp_path / "texts.jsonl"
    lines = [{"text": f"the sky is {'blue' if n % 3 == 0 else 'green'}", "trust": float(n % 3 == 0)} for n in range(60)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "lm.toml"
    path.write_text(LM.format(source=source, stream=stream, weights=weights))
    preset, resolved = load_preset(str(path), [])
    Run.begin(tmp_path / "run", preset, resolved, note=lambda text: None).train()
    model, tokenizer = load_model(tmp_path / "run" / "model").eval(), Tokenizer.load(tmp_path / "run" / "model")
    prompt, blue, green = (tokenizer.ids([text])[0] for text in ("the sky is", "the sky is blue", "the sky is green"))
    at = next(i for i, (a, b) in enumerate(zip(blue, green)) if a != b)
    assert prompt[:at] == blue[:at]
    ids = torch.tensor([blue[:at]])
    text = TokenIds(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    batch = Batch({"text": text}, ["a"], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        said = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"].vocabulary
        logits = (said.hidden @ said.weight.T)[0, -1]
    return float(torch.softmax(logits, 0)[blue[at]]), float(torch.softmax(logits, 0)[green[at]])


@pytest.mark.parametrize("how", ["column", "words", "none"])
def test_weights_of_documents_and_words_change_what_is_said(tmp_path, how):
    stream = {
        "column": '[data.streams.trusted]\nkind = "token-weights"\ncolumn = "trust"',
        "words": '[data.streams.trusted]\nkind = "token-weights"\nwords = { blue = 20.0 }',
        "none": "",
    }[how]
    blue, green = language(tmp_path, stream, 'weights = "trusted"' if stream else "")
    if how == "none":
        assert blue < green
    else:
        assert blue > 2 * green
