"""A request that data or models cannot serve is refused before anything is trained."""

from dataclasses import replace

import pytest
import torch

from tests.training.test_companions import made
from tests.training.test_engine import VOCABULARY, encoder, engine_of, pairs
from tests.training.test_resume import begin
from vlm.config.errors import ExitCode, RequestError
from vlm.models import LanguageOptions, Model
from vlm.objectives import ContrastiveOptions, Objective, TokenCrossEntropyOptions
from vlm.training.companions import Companions
from vlm.training.engine import Clock, Engine, Weighted, gather_streams
from vlm.training.requests import check_offers, check_streams
from vlm.types import Batch, Labels, Layout, Outputs, Request, SingleProcess, Terms, TokenIds, Vocabulary


def asked(*texts):
    return {"mine": [Request.parse(text) for text in texts]}


def language():
    return LanguageOptions(width=16, depth=1, heads=2, ffn_width=24, length=9).build(VOCABULARY)


class Reader(Model):
    """Reads a text with the pictures that a request names."""

    kind = "reader"
    offers = {"tokens": frozenset({"embedding"})}
    takes_context = True

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode(self, batch, wanted):
        out = {}
        for key in wanted:
            stream, context = self.split_key(key)
            text, pictures = batch[stream], batch[context or "image"]
            light = pictures.values.flatten(1).mean(1)[text.sample_index]
            rows = torch.stack([light, text.values.double().mean(1)], 1) * self.scale
            out[key] = Outputs(text.sample_index, text.mask.any(1), embedding=rows)
        return out


def test_what_no_stream_of_the_model_has_is_refused_with_names():
    told = r"'mine' asks for model/text.vocabulary.*dual-encoder.*\n.*of pictures: embedding, hidden"
    with pytest.raises(RequestError, match=told) as caught:
        check_offers(asked("model/text.vocabulary"), {"model": encoder()})
    assert caught.value.exit_code is ExitCode.WRONG_REQUEST
    with pytest.raises(RequestError, match="teacher/text.tokens, and a language model has no tokens"):
        check_offers(asked("model/text.embedding", "teacher/text.tokens"), {"model": encoder(), "teacher": language()})
    check_offers(asked("model/text.embedding", "model/image.hidden:1"), {"model": encoder()})


def test_povid_a_context_is_refused_by_a_model_that_takes_none():
    with pytest.raises(RequestError, match=r"'mine' asks for model/text@image.vocabulary.*reads no text together with a picture"):
        check_offers(asked("model/text@image.vocabulary"), {"model": language()})
    check_offers(asked("model/text@image.embedding"), {"model": Reader()})


def test_streams_are_checked_by_their_kind_and_presence():
    models, batch = {"model": encoder(), "lm": language(), "reader": Reader()}, pairs(3)
    with pytest.raises(RequestError, match=r"no stream 'caption'\n.*group, image, text"):
        check_streams(asked("model/caption.embedding"), models, batch)
    with pytest.raises(RequestError, match="lm/image.vocabulary, and a language model has no vocabulary of pictures"):
        check_streams(asked("lm/image.vocabulary"), models, batch)
    with pytest.raises(RequestError, match=r"no stream 'image.noisy'"):
        check_streams(asked("reader/text@image.noisy.embedding"), models, batch)
    with pytest.raises(RequestError, match="'group' holds none"):
        check_streams(asked("reader/text@group.embedding"), models, batch)
    check_streams(asked("reader/text@image.embedding", "model/group.embedding"), models, batch)


def test_a_stream_of_numbers_that_the_data_do_not_give_is_named():
    model, batch = encoder(), pairs(4)
    engine = engine_of(model, [ContrastiveOptions(smoothing=0.1, smooth_by="quality")])
    with pytest.raises(RequestError, match=r"'contrastive' reads 'quality', and the data give no stream 'quality'") as caught:
        engine.update([batch], Clock(0, 1))
    assert caught.value.exit_code is ExitCode.WRONG_REQUEST
    assert "image" in caught.value.remedy


def test_a_run_that_asks_too_much_ends_before_its_first_update(tmp_path):
    run = begin(tmp_path / "run", 'objectives=[{name="words", kind="token-ce"}]')
    with pytest.raises(RequestError, match="'words' asks for model/text.vocabulary"):
        run.train()
    assert not (tmp_path / "run").exists()
    run = begin(tmp_path / "run", 'objectives.contrastive.columns="caption"')
    with pytest.raises(RequestError, match=r"'contrastive' asks for model/caption.embedding.*no stream"):
        run.train()
    assert not (tmp_path / "run").exists()


def test_the_engine_checks_the_first_batch():
    engine = engine_of(encoder(), [ContrastiveOptions(columns="caption")])
    with pytest.raises(RequestError, match="caption"):
        engine.update([pairs(3)], Clock(0, 1))


class Light(Objective):
    """The squared embedding of a text read with a picture stream; one term a row, none to a row without tokens."""

    def __init__(self, stream, key):
        super().__init__()
        self.stream, self.key = stream, key
        self.requires = tuple(Request.parse(f"{who}/{key}.embedding") for who in ("model", "online"))

    def count(self, batch):
        return batch[self.stream].mask.any(1).sum().double()

    def forward(self, views, context):
        mine, other = views[f"model/{self.key}"], views[f"online/{self.key}"]
        assert torch.equal(mine.embedding, other.embedding)
        values = mine.embedding.square().sum(1)
        return Terms(values, mine.mask.double(), mine.sample_index)


def test_povid_a_text_is_read_with_the_picture_that_the_request_names():
    model, batch = Reader(), pairs(5)
    noisy = batch["image"].map(lambda t: t * 0 if t.dim() == 4 else t)
    batch = batch.with_streams({"image.noisy": noisy})
    companions = made(model, {"online": {"source": "model", "update": {"kind": "live"}}})
    losses = {}
    for key in ("text", "text@image", "text@image.noisy"):
        engine = Engine(model, [Weighted("light", Light("text", key), 1.0)], companions, SingleProcess(), seed=0)
        losses[key] = engine.update([batch], Clock(0, 1)).loss
    assert losses["text"] == losses["text@image"]
    light = batch["image"].values.flatten(1).mean(1)
    assert losses["text"] - losses["text@image.noisy"] == pytest.approx(float(light.square().mean()), abs=1e-6)


class Words(Model):
    """Each token alone, to vocabulary factors and to one embedding a row; any number of rows, none included."""

    kind = "words"
    offers = {"tokens": frozenset({"vocabulary", "embedding"})}

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        self.double()

    def encode(self, batch, wanted):
        out = {}
        for key in wanted:
            text = batch[key]
            hidden = self.table(text.values) * text.mask[..., None]
            layout = Layout.of_tokens(text.values, text.mask, text.sample_index)
            factors = Vocabulary(hidden, self.head.weight)
            out[key] = Outputs(text.sample_index, text.mask.any(1), embedding=hidden.sum(1), vocabulary=factors, layout=layout)
        return out


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_rows_of_text_need_not_be_one_a_sample(parts):
    """0, 1, 2 or 3 rows a sample, in no order, and samples of none: any cut of the update gives the same gradient."""
    whole = pairs(7)
    index = torch.tensor([0, 0, 2, 2, 2, 3, 6, 6])
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 50, (8, 9), generator=generator)
    mask = torch.arange(9)[None] < torch.tensor([9, 3, 2, 5, 7, 1, 4, 0])[:, None]
    text = type(whole["text"])(ids, mask, index, slot=torch.tensor([0, 1, 0, 1, 2, 0, 0, 1]))
    groups = Labels(torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.bool), torch.arange(7))
    batch = whole.with_streams({"text": text, "group": groups})

    def run(count):
        engine = engine_of(Words(), [TokenCrossEntropyOptions()])
        return engine, engine.update(batch.split(count), Clock(0, 1))

    (one, first), (many, second) = run(1), run(parts)
    assert first.loss == pytest.approx(second.loss, abs=1e-6)
    assert first.loss > 0
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


class OnePerSample(Objective):
    """One term a sample, whatever its rows: their sum, over two streams."""

    requires = (Request.parse("model/answer.preferred.embedding"), Request.parse("model/answer.rejected.embedding"))

    def forward(self, views, context):
        values = torch.zeros(len(context.batch), dtype=torch.float64)
        for key in ("answer.preferred", "answer.rejected"):
            view = views[f"model/{key}"]
            values = values.index_add(0, view.sample_index, view.embedding.square().sum(1).double())
        return Terms(values, torch.ones(len(context.batch), dtype=torch.float64), torch.arange(len(context.batch)))


@pytest.mark.parametrize("parts", [2, 4, 7])
def test_a_term_a_sample_over_two_ragged_streams_is_the_same_however_it_is_cut(parts):
    base = pairs(7)
    preferred = replace(base["text"].rows(torch.tensor([0, 1, 3, 4, 6])), sample_index=torch.tensor([0, 1, 3, 4, 6]))
    rejected = replace(base["text"].rows(torch.tensor([5, 0, 1, 2])), sample_index=torch.tensor([0, 0, 2, 6]))
    batch = base.with_streams({"answer.preferred": preferred, "answer.rejected": rejected})

    def run(count):
        model = Words()
        engine = Engine(model, [Weighted("sum", OnePerSample(), 1.0)], Companions(), SingleProcess(), seed=0)
        result = engine.update(batch.split(count), Clock(0, 1))
        return result.loss, [p.grad for p in model.parameters() if p.grad is not None]

    (loss, grads), (other, others) = run(1), run(parts)
    assert loss == pytest.approx(other, abs=1e-9)
    for a, b in zip(grads, others, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_gathered_rows_of_tokens_are_padded_as_padding():
    def part(width):
        ids = torch.ones(2, width, dtype=torch.int64)
        stream = TokenIds(ids, ids.bool(), torch.arange(2), segment=ids * 0)
        return Batch({"text": stream}, ["a", "b"], torch.arange(2), torch.zeros(2, dtype=torch.int64))

    batches = [part(3), part(5)]
    out = gather_streams([b["text"] for b in batches], batches, SingleProcess())
    assert out.segment.tolist() == [[0, 0, 0, -1, -1]] * 2 + [[0] * 5] * 2
    assert out.mask.sum(1).tolist() == [3, 3, 5, 5]
    assert out.sample_index.tolist() == [0, 1, 2, 3]
