"""The `[tokens]` axis: which positions a model drops or merges, by score, selection, application and schedule."""

from vlm.tokens.merging import MergePlan, TowerMergeOptions
from vlm.tokens.options import GatherOptions, TokensOptions
from vlm.tokens.pre import PreStepOptions, TowerScore, TowerView, learned_steps, run_steps
from vlm.tokens.reducer import TokenReducer, picture_counts, select_top
from vlm.tokens.schedule import (
    KeepPlan,
    ScheduleOptions,
    StagesOptions,
    TableOptions,
    sigmoid_rates,
    solved_alpha,
    solved_rates,
)
from vlm.tokens.score import attention_from_rows, query_rows

__all__ = [
    "GatherOptions",
    "KeepPlan",
    "MergePlan",
    "PreStepOptions",
    "ScheduleOptions",
    "StagesOptions",
    "TableOptions",
    "TokenReducer",
    "TokensOptions",
    "TowerMergeOptions",
    "TowerScore",
    "TowerView",
    "attention_from_rows",
    "learned_steps",
    "picture_counts",
    "query_rows",
    "run_steps",
    "select_top",
    "sigmoid_rates",
    "solved_alpha",
    "solved_rates",
]
