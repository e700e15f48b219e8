"""Diffusion noise: the schedule's exact values, clean mean and spread, keyed draws."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.data.noise import noisy, signal_shares, unclamped
from vlm.data.streams.options import DiffusionNoise

BETAS = DiffusionNoise().model_dump(mode="json")["betas"]


def test_povid_signal_shares_are_those_of_the_paper():
    shares = signal_shares(1000, BETAS)
    assert shares[500] == pytest.approx(0.7448, abs=1e-4)
    assert shares[999] == pytest.approx(0.0812, abs=1e-4)
    assert (np.diff(shares) < 0).all()
    product = 1.0
    for t in range(501):
        product *= 1 - (1 / (1 + np.exp(-(-6 + 12 * t / 999))) * (0.5e-2 - 1e-5) + 1e-5)
    assert shares[500] == pytest.approx(product, rel=1e-12)


def test_povid_step_0_leaves_the_picture():
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    difference = noisy(x, signal_shares(1000, BETAS)[0], 5) - x / 255
    assert np.sqrt((difference**2).mean()) < 1e-2
    assert np.abs(difference).max() < 3e-2


@pytest.mark.parametrize("step", [0, 500, 999])
def test_povid_mean_and_spread_before_clamping(step):
    abar = float(signal_shares(1000, BETAS)[step])
    x = np.full((3, 256, 256), 51, np.uint8)
    values = unclamped(x, abar, 7)
    assert values.dtype == np.float32
    n = values.size
    assert values.mean() == pytest.approx(abar**0.5 * 0.2, abs=5 * (1 - abar) ** 0.5 / n**0.5)
    assert values.std() == pytest.approx((1 - abar) ** 0.5, rel=0.01)


def test_povid_noise_is_clamped_and_keyed():
    x = np.full((3, 16, 16), 255, np.uint8)
    one, two, other = noisy(x, 0.7448, 1), noisy(x, 0.7448, 1), noisy(x, 0.7448, 2)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert one.min() >= 0
    assert one.max() == 1
    raw = unclamped(x, 0.7448, 1)
    assert raw.max() > 1
    assert np.array_equal(one, np.minimum(np.maximum(raw, 0), 1))
    assert np.array_equal(noisy(x / np.float32(255), 0.7448, 1), one)
