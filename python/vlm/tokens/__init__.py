"""The `[tokens]` axis: which positions a model drops, by score, selection, application and schedule."""

from vlm.tokens.options import GatherOptions, StagesOptions, TokensOptions
from vlm.tokens.reducer import TokenReducer, picture_counts, select_top
from vlm.tokens.score import attention_from_rows, query_rows

__all__ = [
    "GatherOptions",
    "StagesOptions",
    "TokenReducer",
    "TokensOptions",
    "attention_from_rows",
    "picture_counts",
    "query_rows",
    "select_top",
]
