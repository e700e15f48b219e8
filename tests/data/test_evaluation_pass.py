"""One pass for evaluation: source order, raw fields beside the streams, no draws."""

from __future__ import annotations

import pytest
import torch

from tests.data.data_makers import sample, write_pairs, write_shards, write_tar
from vlm.config.errors import DataError
from vlm.data import DataOptions, Tokenizer, iterate_once, open_source
from vlm.runtime.preprocess import Preprocess

PRE = Preprocess(16)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["a red thing"], 300)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_is_in_source_order_with_raw_fields(tmp_path, tokenizer, workers):
    uri = write_shards(tmp_path, 25, 2)
    options = DataOptions.model_validate(
        {"val": uri, "workers": workers, "image": {"augment": "random-resized-crop"}}
    )
    once = iterate_once(options, tokenizer=tokenizer, preprocess=PRE, batch_size=10)
    batches = list(once)
    source = open_source(uri)
    assert len(once) == 25
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert [key for batch in batches for key in batch.keys] == [source.key(i) for i in range(25)]
    for batch in batches:
        for i, number in enumerate(batch.extra["number"]):
            assert batch.extra["caption"][i] == batch.extra["text"][i] == sample(number)["txt"].decode()
        assert set(batch.extra) >= {"category", "number", "txt"}
    again = list(once)
    assert all(torch.equal(a["image"].values, b["image"].values) for a, b in zip(batches, again))
    assert once.report() == {"read": 25, "bad": 0, "reasons": {}}


def test_bad_samples_are_left_out_and_counted(tmp_path, tokenizer):
    samples = {f"{n}": sample(n) for n in range(9)} | {"bad": {"png": b"", "txt": b"x"}}
    uri = str(write_tar(tmp_path / "a.tar", samples))
    once = iterate_once(
        DataOptions.model_validate({"val": uri, "bad_samples": {"budget": 0.1}}),
        tokenizer=tokenizer,
        preprocess=PRE,
    )
    assert [len(batch) for batch in once] == [9]
    assert once.report()["reasons"] == {"empty": 1}
    with pytest.raises(DataError, match="a.tar:bad"):
        list(iterate_once(DataOptions(val=uri), tokenizer=tokenizer, preprocess=PRE))


def test_a_limit_and_labels_of_training(tmp_path, tokenizer):
    options = DataOptions(val=write_pairs(tmp_path, 12), label="category")
    (batch,) = iterate_once(options, preprocess=PRE, limit=5, classes=["blue", "green"])
    assert len(batch) == 5
    assert batch["label"].values.tolist() == [-1, 1, 0, -1, 1]
    assert batch["label"].mask.tolist() == [False, True, True, False, True]


def test_no_evaluation_data_is_an_error_with_its_remedy():
    with pytest.raises(DataError, match="data.val"):
        iterate_once(DataOptions(), preprocess=PRE)
