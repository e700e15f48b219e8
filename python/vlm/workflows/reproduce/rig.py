"""Does the rig see what is there, and nothing where nothing is?

The baseline of a claim is compared, on the claim's data and by the claim's metric,
- with itself at a quarter of the updates: a planted loss, which must be judged `holds`;
- with itself under other seeds: nothing differs but chance, and the interval must have 0 in it. (By what a 95 % interval
  is, one such check in twenty misses it.)
The learning rate is the one that the claim's tuning chose, where that is stored, so that the claim's own units serve here too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm.training.preset import TuneOptions
from vlm.workflows.reproduce.claim import Arm, Claim, with_length, with_rate
from vlm.workflows.reproduce.measure import Measure
from vlm.workflows.reproduce.workspace import Workspace

DEFAULT_CLAIM = "siglip-tiny"
"""The claim whose baseline is used where none is named."""
PLANTED_SHARE = 0.25
OTHER_SEEDS = 1000
PREFIX = "rig-"


def rig_claims(claim: Claim, factor: float = 1.0) -> dict[str, Claim]:
    """`planted` and `self`: the claim's baseline as method, against what it must beat and what it must equal.

    factor: of the baseline's learning rate, as its tuning chose it.
    """
    whole = replace(claim.baseline, values=with_rate(claim.baseline.values, factor))
    plain: dict[str, Any] = {"metric": claim.metric_of(claim.baseline.name), "baseline_metric": None, "controls": [], "gates": []}
    untuned = claim.options.model_copy(update={"tune": TuneOptions.model_validate({"factors": (1.0,)}), **plain})
    planted = Arm(f"{whole.name} (a quarter of the updates)", with_length(whole.values, PLANTED_SHARE))
    again = Arm(f"{whole.name} (other seeds)", whole.values, seed_offset=OTHER_SEEDS)
    return {
        "planted": replace(claim, key=claim.key, arms=(whole, planted), options=untuned),
        "self": replace(claim, key=claim.key, arms=(whole, again), options=untuned),
    }


def check_rig(claim: Claim, workspace: Workspace, seeds: int | None = None) -> dict[str, Any]:
    """Runs both comparisons and stores the outcome under `rig-KEY`. `ok`: both came out as they must."""
    name = PREFIX + claim.key
    found: dict[str, Any] = {}
    units: list[str] = []
    factor = Measure(claim, workspace).known_factor(claim.baseline)
    for part, comparison in rig_claims(claim, factor).items():
        answer = Measure(comparison, workspace, seeds, claim_name=name).run().to_json(workspace.command)
        units += [key for key in answer.pop("units") if key not in units]
        found[part] = {
            key: answer[key] for key in ("verdict", "margin", "metric", "method", "baseline", "difference", "seeds")
        }
        shared = answer
    inside = found["self"]["difference"]
    ok = found["planted"]["verdict"] == "holds" and inside["lower"] <= 0 <= inside["upper"]
    record = {
        "key": name,
        "claim": claim.key,
        "ok": ok,
        **found,
        **{key: shared[key] for key in ("data", "train", "test", "command", "commit", "measured", "finished")},
        "units": units,
    }
    workspace.results.add_verdict(name, record)
    return record
