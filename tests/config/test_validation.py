"""What is wrong with a preset is said with file, line, column, what was expected, and the nearest word."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from vlm.config.errors import PresetError
from vlm.config.load import resolve, validate
from vlm.config.options import Options
from vlm.config.schema import describe, document


class Ramp(Options):
    start: float
    end: float


class Contrastive(Options):
    kind: Literal["contrastive"] = "contrastive"
    name: str = "contrastive"
    weight: float | Ramp = 1.0
    temperature: Literal["model", "own"] | float = "model"


class Ranking(Options):
    kind: Literal["ranking"] = "ranking"
    name: str = "ranking"
    margin: float = Field(0.1, gt=0, description="required gap in cosine similarity")


Objective = Annotated[Contrastive | Ranking, Field(discriminator="kind")]


class Train(Options):
    steps: int | None = Field(None, gt=0, description="updates")
    epochs: float | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    compile: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class Toy(Options):
    schema_: Literal[1] = Field(alias="schema")
    train: Train
    objectives: list[Objective] = []
    head: Objective | None = None
    companions: dict[str, Train] = {}
    sources: dict[str, Objective] = {}
    anything: dict[str, Any] = {}
    precision: Literal["float32", "bfloat16"] = "float32"


HEAD = "schema = 1\ntrain.steps = 3\n"


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """(where, message) of everything wrong with a text and overrides; an empty list if it is valid."""
    monkeypatch.chdir(tmp_path)

    def problems(text, *overrides, head=HEAD):
        (tmp_path / "x.toml").write_text(head + text, encoding="utf-8")
        resolved = resolve("x.toml", overrides)
        try:
            validate(resolved, Toy)
        except PresetError as error:
            return [(problem.where, problem.message) for problem in error.problems]
        return []

    return problems


def test_a_valid_preset_becomes_an_instance(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(HEAD + '[[objectives]]\nkind = "ranking"\nmargin = 2\n')
    preset = validate(resolve(path, ["objectives.0.margin=3"]), Toy)
    assert preset.train.steps == 3
    assert preset.objectives[0] == Ranking(margin=3.0)


def test_a_misspelt_table_is_named_with_its_place_and_the_nearest_key(problems):
    assert problems("[[objetives]]\nx = 1\n") == [("x.toml:3:3", "unknown key 'objetives'; did you mean 'objectives'?")]


def test_a_misspelt_key_is_named_with_its_table(problems):
    assert problems("train.stps = 4\n") == [("x.toml:3:7", "unknown key 'stps' in [train]; did you mean 'steps'?")]


def test_a_key_of_an_entry_is_compared_with_the_keys_of_its_kind(problems):
    assert problems('[[objectives]]\nkind = "ranking"\nmargn = 1\n') == [
        ("x.toml:5:1", "unknown key 'margn' in [objectives[0]]; did you mean 'margin'?")
    ]
    assert problems('[[objectives]]\nkind = "contrastive"\nmargin = 1\n') == [
        ("x.toml:5:1", "unknown key 'margin' in [objectives[0]]")
    ]


def test_a_key_in_the_wrong_table_is_led_to_the_top_level(problems):
    assert problems("train.precison = 1\n") == [
        ("x.toml:3:7", "unknown key 'precison' in [train]; did you mean the top-level 'precision'?")
    ]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("train.epochs = 'x'\n", "3:16", "train.epochs: expected number, got 'x'"),
        ("train.compile = 3\n", "3:17", "train.compile: expected true | false, got 3"),
        ("train.mean = 0.5\n", "3:14", "train.mean: expected list [number, number, number], got 0.5"),
        ("train.mean = [1, 2]\n", "3:14", "train.mean: expected list [number, number, number], got a list of 2"),
        ("train.mean = [1, 'x', 3]\n", "3:18", "train.mean[1]: expected number, got 'x'"),
        ("objectives = 3\n", "3:14", "objectives: expected list of table of kind contrastive | ranking, got 3"),
        ("precision = 'bfloat61'\n", "3:13", "precision: expected \"float32\" | \"bfloat16\", got 'bfloat61'; did you mean 'bfloat16'?"),
        ("[companions.t]\nsteps = [1]\n", "4:9", "companions.t.steps: expected integer, got a list of 1"),
        ("[companions.t]\nsteps = {}\n", "4:9", "companions.t.steps: expected integer, got a table"),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_what_was_found(problems, text, place, message):
    assert problems(text) == [(f"x.toml:{place}", message)]


def test_a_number_out_of_range_says_the_range(problems):
    assert problems("", head="schema = 1\n[train]\nsteps = -1\n") == [
        ("x.toml:3:9", "train.steps: must be greater than 0, got -1")
    ]


def test_a_member_of_a_plain_union_lists_all_that_is_allowed(problems):
    text = "[[objectives]]\nkind = 'contrastive'\n"
    assert problems(text + "temperature = 'modle'\n") == [
        ("x.toml:5:15", "objectives[0].temperature: expected \"model\" | \"own\" | number, got 'modle'; did you mean 'model'?")
    ]
    assert problems(text + "weight = 'x'\n") == [("x.toml:5:10", "objectives[0].weight: expected number | table, got 'x'")]


def test_a_table_in_a_plain_union_is_told_what_its_own_keys_are(problems):
    text = "[[objectives]]\nkind = 'contrastive'\nweight = {start = 1, stop = 2}\n"
    assert sorted(problems(text)) == [
        ("x.toml:5:1", "[objectives[0].weight] lacks 'end': expected number"),
        ("x.toml:5:22", "unknown key 'stop' in [objectives[0].weight]"),
    ]


def test_an_unknown_kind_lists_the_known_ones(problems):
    assert problems("[head]\nkind = 'rankin'\n") == [("x.toml:4:8", "unknown kind 'rankin' of [head]; did you mean 'ranking'?")]
    assert problems("[sources.a]\nkind = 'x'\n") == [("x.toml:4:8", "unknown kind 'x' of [sources.a]")]


def test_a_missing_kind_is_asked_for(problems):
    assert problems("[head]\nmargin = 1\n") == [("x.toml:3:2", "[head] lacks 'kind': expected one of contrastive, ranking")]


def test_a_missing_table_is_asked_for_at_the_head_of_the_file(problems):
    assert problems("", head="schema = 1\n") == [("x.toml:1:1", "the preset lacks 'train': expected table")]


def test_an_impossible_combination_points_at_its_table(problems):
    assert problems("[companions.t]\nsteps = 1\nepochs = 2.0\n") == [
        ("x.toml:3:1", "companions.t: give either steps or epochs")
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", "expected integer, got 'many'"),
        ("trian.steps=1", "unknown key 'trian'; did you mean 'train'?"),
        ("head.kind=rnking", "unknown kind 'rnking' of [head]; did you mean 'ranking'?"),
        ("objectives.one.margn=2", "unknown key 'margn' in [objectives[0]]; did you mean 'margin'?"),
    ],
)
def test_a_wrong_override_is_located_on_the_command_line(problems, override, message):
    text = "[[objectives]]\nname = 'one'\nkind = 'ranking'\n"
    assert problems(text, override) == [(f"command line: {override.partition('=')[0]}", message)]


def test_a_name_that_equals_a_kind_is_not_taken_for_it(problems):
    assert problems("[sources.ranking]\nkind = 'ranking'\nx = 1\n") == [
        ("x.toml:5:1", "unknown key 'x' in [sources.ranking]")
    ]


def test_all_problems_come_in_one_error_the_first_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text(HEAD + "sed = 1\nprecision = 'x'\n[[objectives]]\nkind = 'rankng'\n")
    with pytest.raises(PresetError) as caught:
        validate(resolve("x.toml"), Toy)
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 3
    assert any("known keys: " in line for line in lines)
    for problem in caught.value.problems:
        assert sum(f"{problem.where}: {problem.message}" in line for line in lines) == 1


def test_hundreds_of_problems_are_counted_rather_than_listed(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(HEAD + "".join(f"wrong{i} = 1\n" for i in range(300)))
    with pytest.raises(PresetError) as caught:
        validate(resolve(path), Toy)
    assert len(caught.value.problems) == 300
    assert len(str(caught.value).splitlines()) < 30


def test_keys_are_explained_with_type_default_and_value():
    docs = {doc.path: doc for doc in document(Toy, {"schema": 1, "train": {"steps": 3}, "sources": {"s": {"kind": "ranking"}}})}
    steps = docs["train", "steps"]
    assert (steps.type, steps.description, steps.value, steps.is_set) == ("integer", "updates", 3, True)
    assert docs["train", "mean"].default == [0.5, 0.5, 0.5]
    assert docs["train",].required
    assert docs["sources", "s", "margin"].default == 0.1
    assert ("sources", "s", "temperature") not in docs
    assert docs["schema",].type == "1"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "integer"),
        (list[str], "list of text"),
        (dict[str, float], "table of number"),
        (Literal["a", 2] | bool, '"a" | 2 | true | false'),
        (Annotated[Contrastive | Ranking, Field(discriminator="kind")] | None, "table of kind contrastive | ranking"),
        (Any, "anything"),
    ],
)
def test_types_are_said_in_the_users_words(annotation, words):
    assert describe(annotation) == words
