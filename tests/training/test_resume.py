"""A run that was stopped anywhere and resumed ends with the same bits as one that was not."""

import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm.config.errors import DataError, ExitCode, RequestError, RunFailed
from vlm.training import run as module
from vlm.training.checkpoint import Checkpoints
from vlm.training.engine import Engine
from vlm.training.preset import load_preset
from vlm.training.run import Run
from vlm.training.trainer import Interrupted

TOY = str(Path(__file__).parent / "toy.toml")


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def begin(output, *overrides):
    preset, resolved = load_preset(TOY, ["scale.threads=1", *overrides])
    return Run.begin(output, preset, resolved, note=lambda text: None)


def finish(output):
    return Run.resume(output, note=lambda text: None).train(strict=True)


def digest(output):
    """sha256 of the final weights, and every figure that is no time."""
    weights = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]


SETTINGS = {
    "plain": [],
    "workers": ["data.workers=2"],
    "accumulate": ["train.accumulate=3"],
    "groups": ["objectives.contrastive.targets=groups"],
    "sigmoid": ["objectives.contrastive.form=sigmoid", "objectives.contrastive.temperature=own"],
    "average": ["train.average=0.9", "train.clip=0.5"],
    "augment": ["data.image.augment=random-resized-crop", "data.captions={kind=\"random\"}"],
    "lora": ["tuning.lora={r=2}"],
    "momentum": [
        'companions.teacher={source="model", update={kind="ema", decay=0.9}}',
        'objectives=[{name="contrastive", kind="contrastive"}, {name="distill", kind="distill"}]',
    ],
    "frozen-copy": [
        'companions.teacher={source="model"}',
        'objectives=[{name="contrastive", kind="contrastive"}, {name="distill", kind="distill"}]',
    ],
}


@pytest.mark.parametrize("settings", list(SETTINGS.values()), ids=list(SETTINGS))
def test_resume_from_every_checkpoint_is_bit_exact(tmp_path, settings):
    begin(tmp_path / "whole", *settings).train()
    expected = digest(tmp_path / "whole")
    assert len(expected[1]) == 12
    for step in (4, 8, 12):
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "whole", work)
        shutil.rmtree(work / "model")
        for path in (work / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        finish(work)
        assert digest(work) == expected, f"from step {step}"
        shutil.rmtree(work)


def test_resume_without_any_checkpoint_starts_again_with_the_same_bits(tmp_path):
    begin(tmp_path / "whole").train()
    work = tmp_path / "work"
    shutil.copytree(tmp_path / "whole", work)
    for name in ("checkpoints", "model", "architecture"):
        shutil.rmtree(work / name)
    finish(work)
    assert digest(work) == digest(tmp_path / "whole")


def test_stages_hand_over_weights_and_resume_inside_each(tmp_path):
    stages = 'stages=[{name="first", train={steps=4}}, {name="second", train={steps=6}, optimizer={lr=1e-4}, tuning={freeze=["vision.*"]}}]'
    begin(tmp_path / "whole", stages, "train.checkpoint_every=2").train()
    expected = digest(tmp_path / "whole")
    assert len(expected[1]) == 10
    for step in (2, 6, 8):
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "whole", work)
        for path in (work / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        finish(work)
        assert digest(work) == expected, f"from step {step}"
        shutil.rmtree(work)


def test_accumulation_gives_the_same_losses(tmp_path):
    begin(tmp_path / "one", "train.steps=6").train()
    begin(tmp_path / "four", "train.steps=6", "train.accumulate=4").train()
    first, second = (digest(tmp_path / name)[1] for name in ("one", "four"))
    for a, b in zip(first, second, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)


def test_evaluation_on_the_way_sees_the_averaged_weights(tmp_path):
    """The same updates, with an average and without: evaluated in the middle of one, at the end of the other."""
    tasks = 'evaluation={every=6, tasks=[{task="retrieval", resamples=100}]}'
    schedule, average = 'schedule={kind="constant", warmup=0}', "train.average=0.9"

    def scores(name, *settings):
        begin(tmp_path / name, tasks, schedule, *settings).train()
        lines = digest(tmp_path / name)[1]
        return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if any(k.startswith("eval/") for k in line)]

    on_the_way, last = scores("twelve", average)
    (at_six,) = scores("six", average, "train.steps=6")
    assert on_the_way == at_six != last
    assert digest(tmp_path / "twelve")[1][-2] == scores_free(tmp_path, schedule, average)


@pytest.mark.parametrize("average", [[], ["train.average=0.9"]], ids=["plain", "average"])
def test_a_signal_ends_an_evaluation_at_once_and_the_resumed_run_makes_up_for_it(tmp_path, monkeypatch, average):
    settings = ['evaluation={every=4, tasks=[{task="retrieval", resamples=100}]}', "train.checkpoint_every=0", *average]
    begin(tmp_path / "whole", *settings).train()
    plain, asked = module.evaluate_in_memory, []

    def slow(model, *rest, **more):
        asked.append(model)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return plain(model, *rest, **more)

    monkeypatch.setattr(module, "evaluate_in_memory", slow)
    started = time.monotonic()
    with pytest.raises(Interrupted) as stopped:
        begin(tmp_path / "run", *settings).train()
    assert stopped.value.code == ExitCode.TERMINATED
    assert time.monotonic() - started < 60
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [8]
    finish(tmp_path / "run")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def scores_free(tmp_path, *settings):
    """The last update of the same run without any evaluation, which must not have moved it."""
    begin(tmp_path / "free", *settings).train()
    return digest(tmp_path / "free")[1][-1]


@pytest.mark.parametrize(("settings", "table"), [
    (["data.image.augment=random-resized-crop"], "data.image"),
    (["data.image.flip=true"], "data.image"),
    (['data.captions={kind="random"}'], "data.captions"),
])
def test_embeddings_of_samples_that_change_are_not_kept(tmp_path, settings, table):
    begin(tmp_path / "base", "train.steps=0").train()
    run = begin(
        tmp_path / "run", f'companions.teacher={{source="{tmp_path / "base"}", cache=true}}',
        'objectives=[{name="distill", kind="distill"}]', "train.steps=1", *settings,
    )  # fmt: skip
    with pytest.raises(RequestError, match=rf"teacher.*{table}[\s\S]*cache = false"):
        run.train()


def test_a_rate_for_no_parameter_is_refused_and_one_for_a_frozen_part_is_not(tmp_path):
    with pytest.raises(RequestError, match=r"tuning.rates: 'visoin.\*' matches no parameter"):
        begin(tmp_path / "run", 'tuning.rates=[{pattern="visoin.*", factor=0.1}]').train()
    rates = 'tuning={rates=[{pattern="vision.*", factor=0.1}, {pattern="objectives.contrastive.*", factor=2}], freeze=["vision.*"]}'
    begin(tmp_path / "run", rates, "objectives.contrastive.temperature=own", "train.steps=1").train()


def test_parameters_of_an_objective_can_be_frozen(tmp_path):
    own = "objectives.contrastive.temperature=own"
    for name, pattern in (("free", None), ("frozen", "objectives.contrastive.*")):
        freeze = [] if pattern is None else [f'tuning.freeze=["{pattern}"]']
        begin(tmp_path / name, own, "train.steps=2", *freeze).train()
    scales = [[line["train/contrastive/scale"] for line in digest(tmp_path / name)[1]] for name in ("free", "frozen")]
    assert scales[0][0] != scales[0][1]
    assert scales[1][0] == scales[1][1]
    with pytest.raises(RequestError, match=r"'objectives.other.\*' matches no parameter[\s\S]*objectives.contrastive.log_scale"):
        begin(tmp_path / "wrong", own, 'tuning.freeze=["objectives.other.*"]').train()


RETRIEVAL = '{task="retrieval", resamples=100}'


@pytest.mark.parametrize(("tasks", "val", "error", "message"), [
    (RETRIEVAL, "!delete", RequestError, "no data to evaluate on"),
    (RETRIEVAL, '"/no/such/*.tar"', DataError, "no file matches"),
    (RETRIEVAL + ', {task="vqa"}', '"scenes:?n=40&size=16&split=val"', RequestError, "vqa needs a model that reads pictures and writes"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_said_before_the_training(tmp_path, tasks, val, error, message):
    with pytest.raises(error, match=message):
        begin(tmp_path / "run", f"evaluation={{tasks=[{tasks}]}}", f"data.val={val}").train()
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_although_its_evaluation_data_are_gone(tmp_path):
    data = archive(tmp_path / "val", 0)
    begin(tmp_path / "run", f"evaluation={{tasks=[{RETRIEVAL}]}}", f'data.val="{data}"').train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-12")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(data.parent)
    assert finish(tmp_path / "run").evaluations == []
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def archive(folder, seed):
    """Sixty little pictures; archives of all seeds have the same names."""
    folder.mkdir()
    draw = random.Random(seed)
    with tarfile.open(folder / "shard-00000.tar", "w") as out:
        for i in range(60):
            color, picture = [draw.randrange(256) for _ in range(3)], io.BytesIO()
            Image.new("RGB", (16, 16), tuple(color)).save(picture, "png")
            for ending, data in (("png", picture.getvalue()), ("txt", " ".join(str(c // 64) for c in color).encode())):
                info = tarfile.TarInfo(f"{i:03d}.{ending}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return folder / "shard-00000.tar"


def test_kept_embeddings_are_those_of_the_stages_own_samples(tmp_path):
    first, second = (archive(tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    begin(tmp_path / "base", "train.steps=0", f'data.source="{first}"').train()
    stages = f'stages=[{{name="a", train={{steps=4}}}}, {{name="b", train={{steps=4}}, data={{source="{second}"}}}}]'
    distil = ['objectives=[{name="distill", kind="distill"}]', f'data.source="{first}"', "data.group_by=!delete", "train.checkpoint_every=1", stages]
    for kept in ("true", "false"):
        begin(tmp_path / kept, f'companions.teacher={{source="{tmp_path / "base"}", cache={kept}}}', *distil).train()
    (_, lines), (_, expected) = digest(tmp_path / "true"), digest(tmp_path / "false")
    for a, b in zip(lines, expected, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)


@pytest.mark.parametrize(("streams", "refused"), [('["image", "text"]', True), ('["image"]', False)])
def test_a_teacher_of_another_tokenizer_reads_no_texts_of_the_run(tmp_path, streams, refused):
    """As many ids, trained on other texts: they would be read without a word, and mean something else."""
    begin(tmp_path / "base", "train.steps=0", "data.source=\"scenes:?n=7&size=16&seed=5\"", "tokenizer.vocab_size=290").train()
    distil = f'objectives=[{{name="distill", kind="distill", streams={streams}}}]'
    settings = [f'companions.teacher={{source="{tmp_path / "base"}"}}', distil, "train.steps=1", "tokenizer.vocab_size=300"]
    if not refused:
        begin(tmp_path / "run", *settings).train()
        return
    with pytest.raises(RequestError, match=r"'teacher' has another tokenizer[\s\S]*kind = \"directory\""):
        begin(tmp_path / "run", *settings).train()
    own = f'tokenizer={{kind="directory", path="{tmp_path / "base" / "model"}"}}'
    begin(tmp_path / "same", *settings[:3], own).train()


@pytest.mark.parametrize(("policy", "error"), [("stop", "objective 'contrastive' is nan at update 3; samples: "), ("skip", None)])
def test_a_loss_that_is_not_finite_names_its_objective_and_samples(tmp_path, monkeypatch, policy, error):
    said = []
    preset, resolved = load_preset(TOY, ["scale.threads=1", "train.checkpoint_every=1", f"train.not_finite={policy}"])
    run = Run.begin(tmp_path / "run", preset, resolved, note=said.append)
    plain = Engine.update

    def broken(self, batches, clock):
        result = plain(self, batches, clock)
        if clock.step == 2:
            result.loss = result.losses["contrastive"] = math.nan
        return result

    monkeypatch.setattr(Engine, "update", broken)
    if error is None:
        run.train()
        assert [text for text in said if "'contrastive' is nan at update 3" in text and text.endswith("skipped")]
        return
    with pytest.raises(RunFailed, match=error):
        run.train()
    assert Checkpoints(run.directory.checkpoints).steps() == [1, 2]


def test_an_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="not empty") as caught:
        begin(tmp_path / "run")
    assert caught.value.remedy == "choose another --output"  # there is no run to continue
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "run" / "preset.toml").write_text("schema = 1\n")
    with pytest.raises(RequestError, match=r"not empty[\s\S]*--resume"):
        begin(tmp_path / "run")


def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path):
    run = begin(tmp_path / "run", 'data.source="/no/such/*.tar"')
    with pytest.raises(DataError):
        run.train()
    assert not (tmp_path / "run").exists()
