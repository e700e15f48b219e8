"""The cases of the decoder do what they say, at a small size: what is kept, equal answers, Amdahl's law."""

from __future__ import annotations

import pytest
import torch

from vlm.bench.decoder import (
    DECODER_CASES,
    SHAPE,
    TEXT,
    Shape,
    account_of_answer,
    account_of_prefill,
    answer,
    greedy,
    llama,
    prefill,
    training_step,
)

SMALL = Shape(width=32, depth=4, heads=4, ffn_width=48, vocab_size=64, image_size=84, tower_width=16, tower_depth=2,
              layers=(1, 2, 3), ratios=(0.5, 0.25, 1 / 12))


def test_a_quarter_of_the_visual_positions_is_kept_on_average() -> None:
    kept = SHAPE.kept(True)
    assert kept == [576, *[192] * 3, *[96] * 4, *[48] * 4]
    assert sum(kept) == 0.25 * 12 * 576
    assert SMALL.kept(True) == [36, 18, 9, 3]
    assert SHAPE.allowed()[0] > 3
    assert all(case.target is None or case.target >= 2 for case in DECODER_CASES)


def test_both_arms_of_the_prefill_keep_what_is_told() -> None:
    arms, account = prefill(SMALL)(), account_of_prefill(SMALL)({})
    for arm, dropping, key in (("dispatched", True, "cache_bytes"), ("peer", False, "peer_cache_bytes")):
        logits, *cache = arms[arm]()  # type: ignore[misc]
        assert logits.shape == (1, SMALL.vocab_size)
        assert [keys.shape[2] for keys in cache[::2]] == [TEXT + n for n in SMALL.kept(dropping)]
        assert sum(t.numel() * 4 for t in cache) == account[key]


def test_the_parts_of_an_answer_are_timed_beside_it() -> None:
    arms = answer(SMALL)()
    assert set(arms) == {"dispatched", "peer", "tower", "peer to first token", "to first token"}
    dropped, full, first = (arms[arm]() for arm in ("dispatched", "peer", "peer to first token"))
    assert [keys.shape[2] for keys in dropped[1::2]] == [TEXT + n + 32 for n in SMALL.kept(True)]  # type: ignore[index]
    assert full[1].shape[2] == first[1].shape[2] + 32 == TEXT + SMALL.visual + 32  # type: ignore[index]
    assert arms["tower"]().shape == (1, 36, 32)  # type: ignore[attr-defined]


def test_the_bound_is_amdahls_law() -> None:
    times = {"peer": 2.0, "tower": 0.4, "peer to first token": 1.4, "dispatched": 1.6, "to first token": 0.7}
    told = account_of_answer(SHAPE)(times)
    reading, writing = SHAPE.allowed()
    bound = 2.0 / (0.4 + 1.0 / reading + 0.6 / writing)
    assert told["shares_of_peer"] == {"tower": 0.2, "prefill": 0.5, "steps": 0.3}
    assert told["allowed_by_amdahl"] == pytest.approx(bound, abs=1e-3)
    assert told["target"] == pytest.approx(0.8 * bound, abs=1e-3)
    assert told["reached_of_allowed"] == pytest.approx(1.25 / bound, abs=1e-3)
    assert 1 < writing < reading


@pytest.mark.parametrize("batch", [1, 3])
def test_the_peer_of_greedy_decoding_writes_the_same_tokens(batch: int) -> None:
    arms = greedy(SMALL, batch, new_tokens=9)()
    ours, theirs = arms["dispatched"](), arms["peer"]()
    assert ours.shape == (batch, 9)  # type: ignore[attr-defined]
    assert torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_a_peer_with_other_weights_is_refused() -> None:
    model = SMALL.language().model_copy(update={"bias": True}).build(SMALL.vocabulary())
    with pytest.raises(RuntimeError, match="does not take our weights"):
        llama(model)


def test_every_arm_of_the_training_step_learns() -> None:
    losses = {arm: [float(work()) for _ in range(4)] for arm, work in training_step(rows=2)().items()}  # type: ignore[arg-type]
    assert set(losses) == {"native", "dispatched", "peer"}
    assert losses["native"][0] > losses["dispatched"][0] > losses["peer"][0] > losses["peer"][-1]
