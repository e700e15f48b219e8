"""The `[decoding]` table."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from pydantic import ValidationError

from vlm.decoding import DecodingOptions
from vlm.runtime.generation import Calibration, Contrast, Decoding


def read(text: str) -> DecodingOptions:
    return DecodingOptions.model_validate(tomllib.loads(text))


def test_the_defaults_are_those_of_the_runtime():
    assert DecodingOptions().to_runtime() == Decoding()
    assert read("contrast = {}").to_runtime() == Decoding(contrast=Contrast())
    assert read("calibrate = {}").calibrate.to_runtime() == Calibration()


def test_every_setting_of_the_table_reaches_the_runtime():
    options = read("""
        kind = "generate"
        strategy = "beam"
        repetition_penalty = 1.2
        beams = 3
        length_penalty = 0.5
        early_stopping = false
        max_new_tokens = 9
        min_new_tokens = 2
        stop = ["END", "\\n"]
        contrast = { negative = "none", alpha = 0.5, beta = 0.2 }
    """)
    assert options.to_runtime() == Decoding(
        "beam", 1.0, 0, 1.0, 0.0, 1.2, 3, 0.5, False, 9, 2, ("END", "\n"), 0, contrast=Contrast("none", 0.5, 0.2)
    )
    options = read("""
        strategy = "sample"
        temperature = 0.2
        top_k = 5
        top_p = 0.9
        min_p = 0.05
        seed = 7
    """)
    assert options.to_runtime() == Decoding("sample", 0.2, 5, 0.9, 0.05, seed=7)


def test_debias_lvlm_as_its_preset_says_it():
    options = read("""
        strategy = "sample"
        temperature = 0.2
        contrast = { negative = "none+unk", alpha = 1.0, beta = 0.1 }
        calibrate = { content_free = "none+unk", mode = "diagonal", eps = 1e-4, scope = "question" }
    """)
    assert options.to_runtime() == Decoding("sample", temperature=0.2, contrast=Contrast("none+unk", 1.0, 0.1))
    assert options.calibrate.to_runtime() == Calibration("none+unk", "diagonal", 1e-4, "question")


@pytest.mark.parametrize("name", ["contrast", "calibrate"])
def test_none_takes_a_branch_out(name):
    assert getattr(read(f'{name} = "none"'), name) is None


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('kind = "other"', "kind"),
        ('strategy = "best"', "strategy"),
        ("temperature = -1", "temperature"),
        ("temperature = nan", "temperature"),
        ("top_p = 0", "top_p"),
        ("beams = 0", "beams"),
        ("length_penalty = inf", "length_penalty"),
        ("max_new_tokens = 0", "max_new_tokens"),
        ("repetition_penalty = inf", "repetition_penalty"),
        ("contrast = { beta = 2 }", "beta"),
        ('contrast = { negative = "no" }', "negative"),
        ("contrast = { alpha = inf }", "alpha"),
        ("calibrate = { eps = 0 }", "eps"),
        ("top_q = 0.5", "top_q"),
        ("min_new_tokens = 65", "min_new_tokens 65 is above max_new_tokens 64"),
        ('stop = [""]', "a stop text is empty"),
    ],
)
def test_what_cannot_be_is_refused(text, where):
    with pytest.raises(ValidationError, match=where):
        read(text)


def test_the_table_is_read_without_torch():
    script = "import sys, vlm.decoding; assert not {'torch', 'onnxruntime', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
