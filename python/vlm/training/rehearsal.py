"""A dry run: every stage assembled and one small update of each measured, in a folder that is thrown away."""

from __future__ import annotations

from vlm.training.plan import Plan, make_plan
from vlm.training.run import Run
from vlm.training.trainer import Cursor


def plans_of(run: Run, output: str, *, before: int = 0) -> list[Plan]:
    """A plan for each stage of a run whose directory is a temporary one. output: where it would really write.

    before: bytes of the process before anything of the run was made.
    """
    plans = []
    for index, stage in enumerate(run.stages):
        parts = run.assemble(stage, Cursor(stage=index), initial=True, rehearse=True)
        try:
            plans.append(make_plan(parts, output, before=before))
        finally:
            parts.loader.close()
    return plans


def write_stand_in(run: Run) -> None:
    """Leave `model/` of a planned run with its architecture and weights of no meaning, for what would start from it."""
    model = run.model_of(run.stages[-1], initial=False)
    assert run.tokenizer is not None
    run.directory.write_model(model, dict(model.state_dict()), run.tokenizer, model.preprocess())
