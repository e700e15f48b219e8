"""Where the first weights come from: parts of other models, their tokenizer, their shape."""

import json
import shutil
from collections.abc import Mapping

import pytest
import torch

from tests.training.test_engine import VOCABULARY, encoder
from tests.training.test_resume import begin, digest, finish
from vlm.config.errors import CheckpointError, RequestError
from vlm.data.tokenizer import Tokenizer
from vlm.models import DualEncoderOptions, LanguageOptions, Model, load_model
from vlm.training import preset as schema
from vlm.training.start import Start, vocabulary_of
from vlm.training.trainer import Cursor
from vlm.types import SingleProcess

TEXTS = ["a red circle", "two blue squares above a green one", "<image> <other>"] * 5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained toy run."""
    output = tmp_path_factory.mktemp("source") / "run"
    begin(output, "train.steps=4", "train.seed=5").train()
    return output


def first_model(run):
    """The model with which a run begins."""
    parts = run.assemble(run.stages[0], Cursor(), initial=True)
    parts.loader.close()
    return parts.model


def test_a_part_has_the_weights_of_its_source_and_the_rest_is_fresh(source, tmp_path):
    model = first_model(begin(tmp_path / "parts", f'start.parts.vision="{source}"'))
    plain = first_model(begin(tmp_path / "plain"))
    given = load_model(source).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (given if name.startswith("vision.") else plain.state_dict())[name]), name
    assert any(not torch.equal(tensor, given[name]) for name, tensor in plain.state_dict().items() if name.startswith("vision."))


def test_the_weights_of_a_part_may_come_on_top_of_a_whole_model(source, tmp_path):
    begin(tmp_path / "other", "train.steps=2").train()
    run = begin(tmp_path / "run", f'start.model="{tmp_path / "other"}"', f'start.parts={{"vision.trunk"="{source}"}}')
    model, whole, part = first_model(run).state_dict(), load_model(tmp_path / "other").state_dict(), load_model(source).state_dict()
    for name, tensor in model.items():
        assert torch.equal(tensor, (part if name.startswith("vision.trunk.") else whole)[name])


def test_a_resume_does_not_need_the_source_any_more(source, tmp_path):
    shutil.copytree(source, tmp_path / "given")
    begin(tmp_path / "whole", f'start.parts.vision="{tmp_path / "given"}"').train()
    expected = digest(tmp_path / "whole")
    shutil.rmtree(tmp_path / "given")
    shutil.rmtree(tmp_path / "whole" / "model")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / f"step-{step}")
    finish(tmp_path / "whole")
    assert digest(tmp_path / "whole") == expected


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (['start.parts.sight="{source}"'], RequestError, r"start.parts.sight = .*no part 'sight'\n.*vision, text"),
        (['start.parts.vision="/no/such/model"'], CheckpointError, r"start.parts.vision = /no/such/model.*no such model"),
        (
            ['start.parts.vision="{source}"', "model.vision.width=48"], CheckpointError,
            r"part 'vision'.*dual-encoder.*\(48,\) here and \(32,\) there",
        ),
        (['start.parts.vision="{source}"', "model.vision.depth=2"], CheckpointError, r"part 'vision'.*only this model has vision\."),
    ],
)
def test_a_part_that_does_not_fit_is_refused_and_leaves_nothing(source, tmp_path, overrides, error, message):
    run = begin(tmp_path / "run", *(text.format(source=source) for text in overrides))
    with pytest.raises(error, match=message):
        run.train()
    assert not (tmp_path / "run").exists()


def test_a_part_of_another_family_is_refused():
    torch.manual_seed(0)
    language = LanguageOptions(width=16, depth=1, heads=2, ffn_width=24, length=9).build(VOCABULARY)
    with pytest.raises(CheckpointError, match=r"part 'trunk'|no part|only"):
        language.take_part("trunk", _Other(encoder().vision.trunk))
    with pytest.raises(RequestError, match="dual-encoder model has no part 'trunk'"):
        language.take_part("trunk", encoder())
    with pytest.raises(RequestError, match="no part ''"):
        language.take_part("", language)


class _Other(Model):
    kind = "other"

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk


class OpenOptions(DualEncoderOptions):
    """A dual encoder whose vision tower has the shape of its source, with a special token."""

    kind: str = "open"

    @property
    def text_part(self) -> str | None:
        return "text"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return ("<image>",)

    def with_parts(self, parts: Mapping[str, Model]):
        if "sight" in parts:
            raise ValueError("there is no sight")
        given = {name: parts[name].options.vision for name in parts if name == "vision"}
        return self.model_copy(update=given)


def open_stage(tmp_path, parts):
    """The toy stage with a model that leaves the shape of its vision tower open."""
    run = begin(tmp_path / "run")
    stage = run.stages[0]
    table = stage.model.model_dump() | {"kind": "open", "vision": stage.model.vision.model_copy(update={"width": 64})}
    options = OpenOptions.model_validate(table)
    start = schema.StartOptions(parts={name: str(path) for name, path in parts.items()})
    return run, stage.model_copy(update={"model": options, "start": start})


def test_shape_and_tokenizer_of_parts_and_the_special_tokens_of_a_family(source, tmp_path):
    run, stage = open_stage(tmp_path, {"vision": source, "text": source})
    start = Start(run.directory, SingleProcess(), lambda text: None)
    tokenizer, model = start._design(stage)
    old = Tokenizer.load(source / "model")
    assert model.options.vision.width == 32
    assert tokenizer.vocab_size == old.vocab_size + 1
    assert tokenizer.token_to_id("<image>") == old.vocab_size
    assert tokenizer.ids(TEXTS[:2]) == old.ids(TEXTS[:2])
    assert model.vocabulary.special["image"] == old.vocab_size
    assert model.options.text.vocab_size == old.vocab_size + 1
    run, stage = open_stage(tmp_path / "second", {"vision": source})
    tokenizer, _ = Start(run.directory, SingleProcess(), lambda text: None)._design(stage)
    assert tokenizer.token_to_id("<image>") == tokenizer.vocab_size - 1  # made by [tokenizer], with the token added
    run, stage = open_stage(tmp_path / "third", {"sight": source})
    with pytest.raises(RequestError, match="there is no sight"):
        Start(run.directory, SingleProcess(), lambda text: None)._design(stage)


def test_special_tokens_get_the_next_ids_and_change_no_other():
    plain = Tokenizer.train_bpe(TEXTS, 280, special=["<kept>"])
    more = plain.with_special(["<image>", "<kept>", "</s>", "<other>"])
    assert more.vocab_size == plain.vocab_size + 2
    assert [more.token_to_id(t) for t in ("<image>", "<other>")] == [plain.vocab_size, plain.vocab_size + 1]
    assert more.token_to_id("<kept>") == plain.token_to_id("<kept>")
    assert (more.bos_id, more.eos_id, more.pad_id) == (plain.bos_id, plain.eos_id, plain.pad_id)
    assert more.ids(TEXTS[:2]) == plain.ids(TEXTS[:2])
    assert more.ids(["<image>"], add_special=False) == [[plain.vocab_size]]
    assert more.decode(more.ids(["a <image> b"])[0]) == more.decode(more.ids(["a  b"])[0])  # left out like any special token
    assert plain.token_to_id("<image>") is None
    again = more.with_special(["<image>"])
    assert again.vocab_size == more.vocab_size
    assert vocabulary_of(more, ("<image>",)).special["image"] == plain.vocab_size
    assert "image" not in vocabulary_of(more).special


def test_special_tokens_are_saved_and_published_tokenizers_read_them(tmp_path):
    from transformers import AutoTokenizer

    more = Tokenizer.train_bpe(TEXTS, 280).with_special(["<image>"])
    more.save(tmp_path)
    assert Tokenizer.load(tmp_path).ids(["x <image> y"]) == more.ids(["x <image> y"])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("x <image> y")["input_ids"] == more.ids(["x <image> y"])[0]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "<image>" in config["additional_special_tokens"]
