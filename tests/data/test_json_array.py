"""JSON arrays (LLaVA's data) and COCO captions behind one address."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.data.data_makers import sample
from vlm.config.errors import DataError
from vlm.data import BadSample, DataOptions, build_loader, open_source
from vlm.data.sources import json_array
from vlm.runtime.preprocess import Preprocess


def llava(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for n in range(count):
        (folder / f"{n}.png").write_bytes(sample(n)["png"])
        talk = [{"from": "human", "value": "<image>\nwhat é?"}, {"from": "gpt", "value": f"thing {n}"}]
        entries.append({"id": str(n), "image": f"{n}.png", "conversations": talk})
    return entries


def coco(folder, split="val2017", count=3):
    (folder / "annotations").mkdir(parents=True)
    (folder / split).mkdir()
    images, annotations = [], []
    for n in range(count):
        (folder / split / f"{n:012}.png").write_bytes(sample(n)["png"])
        images.append({"id": 100 + n, "file_name": f"{n:012}.png", "width": 16, "height": 16})
        annotations += [{"id": 10 * n + k, "image_id": 100 + n, "caption": f" caption {k} of {n}\n"} for k in range(n + 1)]
    path = folder / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations[::-1]}))
    return path


def test_a_llava_file_is_detected_and_read(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(llava(tmp_path), indent=1, ensure_ascii=False), encoding="utf-8")
    source = open_source(str(path))
    assert source.kind == "LLaVA conversations (JSON array)"
    assert len(source) == 4
    assert source.key(2) == "llava.json:3"
    assert source.read(2).fields["conversations"][0]["value"] == "<image>\nwhat é?"
    (tmp_path / "again.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    again = open_source(str(tmp_path / "again.json.gz"))
    assert again.ids.tolist() == source.ids.tolist()
    assert len(open_source(f"{path},{tmp_path / 'again.json.gz'}")) == 8


def test_entries_that_are_no_objects_are_bad_samples_and_the_rest_is_good(tmp_path):
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([{"messages": []}, 3, None, {"text": "a\nb"}]))
    source = open_source(str(path))
    assert source.kind == "chat messages (JSON array)"
    assert source.read(3).fields == {"text": "a\nb"}
    for index in (1, 2):
        with pytest.raises(BadSample, match="bad_json"):
            source.read(index)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ('{"a": 1}', "neither an array"), ("3", "neither an array"), ("[" * 100_000, "not JSON"), ("[]", "no samples")],
)
def test_other_json_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        open_source(str(path))
    assert "odd.json" in str(caught.value)


def test_size_and_encoding_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="not UTF-8"):
        open_source(str(path))
    monkeypatch.setattr(json_array, "MAX_FILE", 3)
    with pytest.raises(DataError, match="expected at most 3"):
        open_source(str(path))


def test_coco_captions_are_one_sample_a_picture(tmp_path):
    path = coco(tmp_path)
    source = open_source(str(path))
    assert source.kind == "COCO captions"
    assert source.describe()["pictures"] == str(tmp_path / "val2017")
    fields = source.read(2).fields
    assert fields["captions"] == ["caption 2 of 2", "caption 1 of 2", "caption 0 of 2"]
    assert fields["caption"] == "caption 2 of 2"
    assert fields["image_id"] == 102
    options = DataOptions.model_validate({"source": str(path)})
    with build_loader(options, preprocess=Preprocess(16), batch_size=3) as loader:
        assert next(loader)["image"].values.shape == (3, 3, 16, 16)


def test_coco_files_of_another_kind_are_refused(tmp_path):
    path = coco(tmp_path)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "annotations": [{"image_id": 100, "bbox": [0, 0, 1, 1]}]}))
    with pytest.raises(DataError, match=r"annotations\[0\].*image_id and caption"):
        open_source(str(path))
    path.write_text(json.dumps({**whole, "images": [{"id": 1}]}))
    with pytest.raises(DataError, match=r"images\[0\]"):
        open_source(str(path))


def test_files_of_several_forms_are_refused(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(llava(tmp_path)))
    with pytest.raises(DataError, match="several forms"):
        open_source(f"{path},{coco(tmp_path / 'coco')}")
