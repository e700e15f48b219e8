"""Hostile and damaged archives: nothing is extracted, what is wrong is a named, refused sample or one clear error."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import time
import tracemalloc

import numpy as np
import pytest

from tests.data.data_makers import add, sample, write_tar
from vlm.config.errors import DataError
from vlm.data import BadSample, DataOptions, build_loader, open_source
from vlm.data.sources.tar_index import scan_tar
from vlm.runtime.preprocess import Preprocess


def build(path, fill, form=tarfile.USTAR_FORMAT):
    """A tar with a good sample, then whatever `fill` adds, then another good sample."""
    with tarfile.open(path, "w", format=form) as archive:
        for extension, data in sample(0).items():
            add(archive, f"first.{extension}", data)
        fill(archive)
        for extension, data in sample(1).items():
            add(archive, f"last.{extension}", data)
    return str(path)


def outcomes(uri):
    """key -> reason, empty for a good sample."""
    source = open_source(uri)
    out = {}
    for i in range(len(source)):
        try:
            source.read(i)
            out[source.key(i).partition(":")[2]] = ""
        except BadSample as error:
            out[source.key(i).partition(":")[2]] = error.reason
    return out


ATTACKS = {
    "parent": (lambda a: add(a, "../../escape.png", b"x"), "bad_name"),
    "parent-inside": (lambda a: add(a, "a/../../escape.png", b"x"), "bad_name"),
    "absolute": (lambda a: add(a, "/etc/escape.png", b"x"), "bad_name"),
    "newline": (lambda a: add(a, "a\nb.png", b"x"), "bad_name"),
    "symlink": (lambda a: add(a, "evil.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link"),
    "hardlink": (lambda a: add(a, "evil.png", type=tarfile.LNKTYPE, linkname="../../etc/passwd"), "link"),
    "character-device": (
        lambda a: add(a, "evil.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "device",
    ),
    "block-device": (lambda a: add(a, "evil.png", type=tarfile.BLKTYPE), "device"),
    "fifo": (lambda a: add(a, "evil.png", type=tarfile.FIFOTYPE), "device"),
    "gnu-sparse": (lambda a: add(a, "evil.png", b"", type=tarfile.GNUTYPE_SPARSE), "sparse"),
    "pickle": (lambda a: add(a, "evil.pkl", pickle.dumps({"a": 1})), "pickle"),
    "torch-file": (lambda a: add(a, "evil.features.pt", b"PK\x03\x04"), "pickle"),
    "unknown-kind": (lambda a: add(a, "evil.png", b"x", type=b"Z"), "device"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_one_refused_sample_and_the_rest_is_read(name, tmp_path):
    fill, reason = ATTACKS[name]
    path = tmp_path / "in" / "shard.tar"
    path.parent.mkdir()
    uri = build(path, fill)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    found = outcomes(uri)
    assert found.pop("first") == found.pop("last") == ""
    assert list(found.values()) == [reason]
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_attacks_are_counted_and_named_by_the_loader(tmp_path):
    def fill(archive):
        for make, _ in ATTACKS.values():
            make(archive)

    uri = build(tmp_path / "shard.tar", fill)
    options = DataOptions.model_validate({"source": uri, "bad_samples": {"budget": 1.0}})
    with build_loader(options, preprocess=Preprocess(8), batch_size=4, quarantine=tmp_path) as loader:
        batch = next(loader)
    assert set(batch.keys) == {"shard.tar:first", "shard.tar:last"}
    assert "bad_name" in (tmp_path / "quarantine.jsonl").read_text()
    with build_loader(DataOptions(source=uri), preprocess=Preprocess(8), batch_size=4) as loader:
        with pytest.raises(DataError, match="samples are bad") as caught:
            next(loader)
        assert caught.value.exit_code == 3


def test_a_pax_sparse_member_is_refused(tmp_path):
    def fill(archive):
        info = tarfile.TarInfo("evil.png")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.name": "evil.png",
            "GNU.sparse.realsize": "99999999999",
        }
        archive.addfile(info, io.BytesIO())

    assert outcomes(build(tmp_path / "a.tar", fill, tarfile.PAX_FORMAT))["evil"] == "sparse"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_in_every_format(tmp_path, form):
    folder = "d" * 90 + "/" + "e" * 60
    name = f"{folder}/bäume" if form != tarfile.USTAR_FORMAT else f"{folder}/trees"
    uri = build(tmp_path / "a.tar", lambda a: [add(a, f"{name}.{e}", d) for e, d in sample(5).items()], form)
    found = outcomes(uri)
    assert found == {"first": "", name: "", "last": ""}


def test_an_overlong_gnu_name_is_refused(tmp_path):
    uri = build(tmp_path / "a.tar", lambda a: add(a, "x" * 9000 + ".png", b"x"), tarfile.GNU_FORMAT)
    found = outcomes(uri)
    assert found["first"] == found["last"] == ""
    assert "bad_name" in found.values()


def test_a_long_name_that_escapes_is_refused(tmp_path):
    uri = build(tmp_path / "a.tar", lambda a: add(a, "../" * 60 + "etc/passwd.png", b"x"), tarfile.GNU_FORMAT)
    assert sorted(outcomes(uri).values()) == ["", "", "bad_name"]


def test_two_members_of_one_name_make_a_bad_sample(tmp_path):
    uri = build(tmp_path / "a.tar", lambda a: [add(a, "twice.txt", b"a"), add(a, "twice.txt", b"b")])
    assert outcomes(uri) == {"first": "", "twice": "duplicate_member", "last": ""}


@pytest.mark.parametrize("cut", [100, 512 + 100, 1700, 2100])
def test_an_archive_that_breaks_off_loses_only_its_end(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar", {f"{n}": sample(n) for n in range(3)})
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: end - cut])
    found = outcomes(str(path))
    assert found["0"] == found["1"] == ""
    assert "truncated_archive" in found.values()


def test_an_archive_without_its_end_marker_is_whole(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}": sample(n) for n in range(3)})
    data = path.read_bytes()
    index = scan_tar(str(path))
    stop = int(max(index.offset + (index.size + 511) // 512 * 512))
    path.write_bytes(data[:stop])
    assert outcomes(str(path)) == {"0": "", "1": "", "2": ""}


def test_a_damaged_header_ends_the_archive_by_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}": sample(n) for n in range(4)})
    index = scan_tar(str(path))
    data = bytearray(path.read_bytes())
    data[int(index.offset[index.start[2]]) - 500] ^= 0xFF
    path.write_bytes(data)
    found = outcomes(str(path))
    assert "damaged_archive" in found.values()
    assert found["0"] == found["1"] == ""


def test_a_size_that_lies_is_not_believed(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("huge.png")
    info.size = 1 << 40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tracemalloc.start()
    assert outcomes(str(path)) == {"huge": "truncated_archive"}
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    negative = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b"%06o\0 " % (sum(negative) - sum(negative[148:156]) + 256)
    path.write_bytes(bytes(negative) + bytes(1024))
    with pytest.raises(DataError, match="not a tar file"):
        scan_tar(str(path))


def test_files_that_are_no_archives_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>not found</html>".ljust(2048))
    with pytest.raises(DataError, match="not a tar file"):
        open_source(str(path))
    path.write_bytes(gzip.compress(b"x" * 4096))
    with pytest.raises(DataError, match="compressed with gzip"):
        open_source(str(path))
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no samples"):
        open_source(str(path))
    path.write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="not a tar file"):
        open_source(str(path))


def test_very_many_tiny_members_stay_bounded(tmp_path, monkeypatch):
    path = tmp_path / "many.tar"
    count = 20_000
    template = bytearray(tarfile.TarInfo("000000.txt").tobuf(tarfile.USTAR_FORMAT))
    with open(path, "wb") as file:
        for start in range(0, count, 10_000):
            blocks = np.tile(np.frombuffer(bytes(template), np.uint8), (10_000, 1))
            digits = np.array([list(b"%06d" % n) for n in range(start, start + 10_000)], np.uint8)
            blocks[:, :6] = digits
            sums = blocks.astype(np.int64).sum(1) - blocks[:, 148:156].astype(np.int64).sum(1) + 256
            blocks[:, 148:156] = np.array([list(b"%06o\0 " % n) for n in sums.tolist()], np.uint8)
            file.write(blocks.tobytes())
    tracemalloc.start()
    started = time.monotonic()
    index = scan_tar(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == count
    assert peak < 600 * count
    assert time.monotonic() - started < 60
    monkeypatch.setattr("vlm.data.sources.tar_index.MAX_MEMBERS", 1000)
    with pytest.raises(DataError, match="more than 1000 members"):
        scan_tar(str(path))


class Canary:
    def __reduce__(self):
        return (os.mkdir, (self.path,))

    def __init__(self, path):
        self.path = path


def test_a_pickle_in_any_disguise_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    poison = pickle.dumps(Canary(str(canary)))
    disguises = {
        f"{i}": {e: poison, "txt": b"words"}
        for i, e in enumerate(["pkl", "png", "json", "pth", "bin", "npy", "cls"])
    }
    uri = str(write_tar(tmp_path / "a.tar", disguises))
    options = DataOptions.model_validate({"source": uri, "bad_samples": {"budget": 1.0}})
    with build_loader(options, preprocess=Preprocess(8), batch_size=1) as loader, pytest.raises(DataError):
        next(loader)
    for name in ("x.pkl", "x.pt", "x.npy", "x.bin", "x.jsonl", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(poison)
        with (
            pytest.raises(DataError),
            build_loader(
                DataOptions(source=str(tmp_path / name)), preprocess=Preprocess(8), batch_size=1
            ) as loader,
        ):
            next(loader)
    with pytest.raises(DataError, match="pickle"):
        open_source(str(tmp_path / "x.pt"))
    assert not canary.exists()
