"""CSV and TSV behind one address."""

from __future__ import annotations

import gzip

import pytest

from tests.data.data_makers import sample
from vlm.config.errors import DataError
from vlm.data import BadSample, DataOptions, build_loader, open_source
from vlm.data.check import check
from vlm.runtime.preprocess import Preprocess


@pytest.fixture
def pictures(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(sample(n)["png"])
    return tmp_path


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", "\t"), ("a.csv", ";"), ("a.tsv", "\t")])
def test_the_columns_of_open_clip_are_found_whatever_separates_them(pictures, name, mark):
    rows = [("filepath", "title"), *((f"{n}.png", f"thing {n}") for n in range(4))]
    path = write(pictures / name, "".join(mark.join(row) + "\n" for row in rows))
    source = open_source(path)
    assert source.kind == "table (CSV or TSV)"
    assert len(source) == 4
    assert source.read(1).fields == {"filepath": "1.png", "title": "thing 1"}
    options = DataOptions(source=path)
    seen = check(source, options)
    assert (seen["good"], seen["pictures"]["count"], seen["texts"]["distinct"]) == (4, 4, 4)


def test_a_loader_reads_pictures_and_captions(pictures):
    path = write(pictures / "a.csv", "image,caption\r\n" + "".join(f'{n}.png,"one, two {n}"\r\n' for n in range(4)))
    loader = build_loader(DataOptions(source=path, val=path), preprocess=Preprocess(16, "squash"), batch_size=4, split="val")
    batch = next(iter(loader))
    assert batch.keys == ["a.csv:2", "a.csv:3", "a.csv:4", "a.csv:5"]


def test_rows_are_named_by_the_line_on_which_they_begin(pictures):
    text = 'image,caption\n0.png,"two\nlines"\n\n1.png\n2.png,fine\n'
    source = open_source(write(pictures / "a.csv", text))
    assert [source.key(i) for i in range(3)] == ["a.csv:2", "a.csv:5", "a.csv:6"]
    assert source.read(0).fields["caption"] == "two\nlines"
    with pytest.raises(BadSample, match="1 cells where 2 columns are") as caught:
        source.read(1)
    assert caught.value.reason == "bad_row"


def test_a_row_that_is_not_utf8_is_bad_and_the_rest_is_good(pictures):
    source = open_source(write(pictures / "a.csv", b"\xef\xbb\xbfimage,caption\n0.png,caf\xe9\n1.png,caf\xc3\xa9\n"))
    assert source.read(1).fields == {"image": "1.png", "caption": "café"}
    with pytest.raises(BadSample, match="column caption is not UTF-8"):
        source.read(0)


def test_an_empty_cell_is_no_field(pictures):
    source = open_source(write(pictures / "a.csv", "image,caption\n0.png,\n1.png,b\n"))
    assert source.read(0).fields == {"image": "0.png"}
    assert check(source, DataOptions(source="x"))["texts"]["count"] == 1


@pytest.mark.parametrize("head", ["", "\n", "image,image\n", "image,,caption\n", b"im\xe9ge,b\n"])
def test_a_header_that_names_no_columns_is_said(pictures, head):
    head = head if isinstance(head, bytes) else head.encode()
    with pytest.raises(DataError, match="names no columns") as caught:
        open_source(write(pictures / "a.csv", head + b"0.png,b\n" * bool(head)))
    assert str(caught.value.where).endswith("a.csv:1")


def test_a_quote_without_its_end_is_said(pictures):
    long = "0.png,b\n" * 20000
    with pytest.raises(DataError, match="not a table") as caught:
        open_source(write(pictures / "a.csv", 'image,caption\n0.png,"b\n' + long))
    assert str(caught.value.where).endswith("a.csv:2")
    assert "quote" in caught.value.remedy


def test_gzip_and_several_files(pictures):
    first = write(pictures / "a.csv", "image,caption\n0.png,a\n")
    second = write(pictures / "b.csv.gz", gzip.compress(b"image,caption\n1.png\n1.png,b\n"))
    source = open_source(f"{first},{second}")
    assert [source.key(i) for i in range(3)] == ["a.csv:2", "b.csv.gz:2", "b.csv.gz:3"]
    assert source.read(2).fields["caption"] == "b"
    with pytest.raises(BadSample):
        source.read(1)
    assert open_source(f"csv:{first}").ids.tolist() == source.ids.tolist()[:1]
