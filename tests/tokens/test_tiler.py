"""The options of the tiler say what the runtime's tiling takes."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from vlm.runtime import tiling
from vlm.tokens.tiler import TilerOptions


def test_nvlm_is_the_default():
    assert TilerOptions().build(448) == tiling.Tiling(448, 6, "closest-ratio", "last", "text-1d")


@pytest.mark.parametrize(
    ("field", "words"), [("select", tiling.Select), ("thumbnail", tiling.Thumbnail), ("tags", tiling.TagStyle)]
)
def test_the_words_are_those_of_the_runtime(field, words):
    assert get_args(TilerOptions.model_fields[field].annotation) == get_args(words)
    for word in get_args(words):
        assert getattr(TilerOptions.model_validate({field: word}).build(32), field) == word


@pytest.mark.parametrize("wrong", [{"max_tiles": 0}, {"max_tiles": 65}, {"thumbnail": "middle"}, {"tags": True}, {"side": 3}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        TilerOptions.model_validate(wrong)
