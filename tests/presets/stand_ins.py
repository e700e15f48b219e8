"""Presets at the size of a test: models of no meaning in place of their bases, few samples, small batches."""

import contextlib
import hashlib
import json
import shutil

from vlm.training.directory import RunDirectory
from vlm.training.preset import load_preset, stages_of
from vlm.training.rehearsal import write_stand_in
from vlm.training.run import Run
from vlm.training.trainer import Cursor
from vlm.workflows.bases import with_bases

FEW = "scenes:?n=96"
FEW_OF = {"clips": "clips:?n=96&frames=4&size=16", "digits": "digits:?n=96&length=2&width=64"}
VISION = "{width=24, depth=1, heads=3, image_size=32, patch_size=4}"
TEXT = "{width=24, depth=1, heads=3, length=16}"
SMALL = {
    "dual-encoder": ["model.embed_dim=24", f"model.vision={VISION}", f"model.text={TEXT}", "tokenizer.vocab_size=300"],
    "language": ["model.width=32", "model.depth=2", "model.heads=2", "model.kv_heads=1", "model.ffn_width=48", "tokenizer.vocab_size=300"],
    "vision": ["model.tower.width=12", "model.tower.depths=[2, 1]", "model.tower.heads=[2, 2]"],
    "video": ["model.tower.width=16", "model.tower.depth=1", "model.tower.heads=2"],
    "vision-language": [],  # small where its bases are
}
"""Family -> overrides that make its presets small."""


def few(source):
    """A few samples of the kind that `source` draws, of scenes where it draws none."""
    return FEW_OF.get((source or "").partition(":")[0], FEW)


def small(key, models, *overrides):
    """(preset, resolved) of a packaged preset with stand-ins for its bases, tiny batches and no data but what is drawn."""
    preset, _ = load_preset(key)
    stages = preset.stages or [{}]
    given = ["train.batch_size=4", "train.accumulate=1", "scale={threads=1, processes=1}", "data.workers=0"]
    clips = (preset.data.source or "").startswith("clips:")
    mixed = [(s["name"], name, part["source"]) for s in stages for name, part in s.get("data", {}).get("mixture", {}).items()]
    own = [f'data.mixture.{name}.source="{few(part.source)}"' for name, part in preset.data.mixture.items()]
    parts = [f'stages.{stage}.data.mixture.{name}.source="{few(source)}"' for stage, name, source in mixed]
    given += parts or own or [f'data.source="{few(preset.data.source)}"']
    given += [f'stages.{stage["name"]}.train.batch_size=4' for stage in stages if "batch_size" in stage.get("train", {})]
    if preset.data.val is not None:
        given.append(f'data.val="{few(preset.data.val).replace("96", "12")}&split=val"')
    if preset.model is not None:
        brought = getattr(preset.model, "text_part", None) in preset.start.parts  # a part that brings its tokenizer
        given += [text for text in SMALL["video" if clips else preset.model.kind] if not (brought and text.startswith("tokenizer."))]
        tokens = getattr(preset.model, "tokens", None)
        if tokens is not None and tokens.keep is not None:  # a language model of two layers has one place to drop
            given.append('model.tokens.keep={kind="stages", layers=[1], ratios=[0.5]}')
        if tokens is not None and any(step.needs_grid for step in tokens.pre):  # and a tower of one block no block before it
            given.append('model.tokens.pre=[{score={kind="attention-received", layer=-1}, select={kind="top-k", ratio=0.5}}]')
    if preset.data.text.captions is not None:  # a text tower as short as that above
        given.append("data.text.captions=16")
    if preset.tuning.prompt is not None:  # as short as that text tower
        given.append("tuning.prompt.length=4")
    given += [f"objectives.{o.name}.layer=2" for o in preset.objectives if o.kind == "sequence-align"]  # the last of two
    if preset.model is None and preset.start.model is None:  # one that is to be given a model
        given.append(f'start.model="{models["clip-tiny"]}"')
    preset, resolved = load_preset(key, [*given, *overrides])
    resolved = with_bases(resolved, models)
    return type(preset).model_validate(resolved.values), resolved


def make_stand_ins(folder):
    """Base -> a model directory of its family and parts, with weights of no meaning."""
    models = {}
    for key in ("clip-tiny", "clip-tiny-objects", "clip-tiny-digits", "lm-tiny", "lm-tiny-student", "vlm-tiny"):
        run = Run(RunDirectory(folder / key), *small(key, models), note=quiet)
        write_stand_in(run)
        models[key] = folder / key
    return models


def quiet(text):
    return None


def begin(output, key, models, *overrides):
    return Run.begin(output, *small(key, models, *overrides), note=quiet)


@contextlib.contextmanager
def assembled(run, stage=0, weights=None):
    """The parts of a stage of a run as it begins, with which nothing was learned yet."""
    parts = run.assemble(run.stages[stage], Cursor(stage=stage), initial=stage == 0, weights=weights, rehearse=True)
    try:
        yield parts
    finally:
        parts.loader.close()


def steps_of_stages(key, steps):
    """Overrides that make every stage of a preset so many updates long."""
    names = [stage.name for stage in stages_of(load_preset(key)[1])]
    return [f"stages.{name}.train.steps={steps}" for name in names] if load_preset(key)[0].stages else [f"train.steps={steps}"]


def digest(output):
    """sha256 of the final weights, and every figure that is no time."""
    weights = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]


def resumed_after(output, step, work):
    """The digest of a copy of a finished run that goes on from the checkpoint after `step` updates."""
    shutil.copytree(output, work)
    shutil.rmtree(work / "model")
    for path in (work / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    Run.resume(work, note=quiet).train(strict=True)
    return digest(work)
