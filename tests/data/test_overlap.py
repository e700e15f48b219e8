"""What training and evaluation data share is found, and only that; `data.exclude` leaves it out."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlm.cli.main import main
from vlm.config.errors import DataError
from vlm.data.loader import open_split
from vlm.data.mixture import excluded_keys
from vlm.data.options import DataOptions
from vlm.data.overlap import Nearness, check_comparable, overlap, runs_of, signs_of, steps_of, words_of
from vlm.export.drawings import drawn_picture

LONG = " ".join(f"word{i}" for i in range(40))


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def folder(path, pictures, texts):
    path.mkdir()
    for name, (data, suffix) in pictures.items():
        (path / f"{name}.{suffix}").write_bytes(data)
        (path / f"{name}.txt").write_text(texts[name])
    return str(path)


@pytest.fixture
def sides(tmp_path):
    p = [drawn_picture(120, 90, i) for i in range(6)]
    train = folder(
        tmp_path / "train",
        {"a": (encoded(p[0]), "png"), "b": (encoded(p[1]), "png"), "c": (encoded(p[2]), "png"), "d": (encoded(p[3]), "png")},
        {"a": "one", "b": "two", "c": "A RED, circle!", "d": f"before it {LONG} after"},
    )
    grey = p[5].convert("L").convert("RGB")
    val = folder(
        tmp_path / "val",
        {
            "same": (encoded(p[0]), "png"),
            "smaller": (encoded(p[1].resize((80, 60)), "JPEG", quality=80), "jpg"),
            "text": (encoded(p[4]), "png"),
            "copy": (encoded(grey), "png"),
        },
        {"same": "else", "smaller": "other", "text": "a red circle", "copy": LONG},
    )
    return train, val


def signs(uri):
    options = DataOptions(source=uri)
    return signs_of(open_split(options, "train"), options)


def test_pictures_near_pictures_and_texts_are_found_and_nothing_else(sides):
    found = {(m.evaluation.rpartition(":")[2], m.key.rpartition(":")[2]): m for m in overlap(*map(signs, sides), Nearness())}
    assert set(found) == {("same.png", "a.png"), ("smaller.jpg", "b.png"), ("text.png", "c.png"), ("copy.png", "d.png")}
    by = {pair[0].split(".")[0]: match for pair, match in found.items()}
    assert (by["same"].picture, by["same"].bits) == ("exact", 0)
    assert by["smaller"].picture == "near"
    assert by["text"].text
    assert by["text"].picture is None
    assert by["copy"].words == 1.0
    assert not by["copy"].text


@pytest.mark.parametrize("bits", [0, 1, 2, 6, 20])
def test_near_is_what_comparing_every_pair_says(bits):
    random = np.random.default_rng(bits)
    base = [drawn_picture(40, 40, i) for i in range(12)]
    noisy = [Image.fromarray(np.clip(np.asarray(p) + random.normal(0, 6, (40, 40, 3)), 0, 255).astype(np.uint8)) for p in base]

    def made(pictures):
        from vlm.data.overlap import Signs

        small = np.stack([np.asarray(p.resize((8, 8), Image.Resampling.BILINEAR)).reshape(-1) for p in pictures])
        names = [str(i) for i in range(len(pictures))]
        none = [np.zeros(0, np.uint64)] * len(pictures)
        return Signs(names, list(range(len(pictures))), [n.encode() + bytes([len(pictures)]) for n in names],
                     np.stack([steps_of(p) for p in pictures]), small, [None] * len(pictures), none)  # fmt: skip

    one, two = made([*base, *noisy]), made(noisy[:7])
    got = {(m.evaluation, m.key): m.bits for m in overlap(one, two, Nearness(bits, 16)) if m.picture == "near"}
    wanted = {}
    for i in range(len(two.owner)):
        for j in range(len(one.owner)):
            apart = sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(one.hashes[j], two.hashes[i]))
            colour = np.abs(one.small[j].astype(int) - two.small[i].astype(int)).max()
            if apart <= bits and colour <= 16:
                wanted[str(i), str(j)] = apart
    assert got == wanted
    assert len(got) >= 7


def test_words_and_runs():
    assert words_of("Grüße,  WELT! ２") == ["grüsse", "welt", "2"]
    assert len(runs_of(words_of(LONG))) == 40 - 12
    assert len(runs_of(words_of("too short"))) == 0
    with pytest.raises(DataError, match="neither pictures nor texts"):
        check_comparable(signs_of_nothing(), signs_of_nothing())


def signs_of_nothing():
    from vlm.data.overlap import Signs

    return Signs()


def test_the_command_writes_keys_that_data_exclude_leaves_out(sides, tmp_path, capsys):
    train, val = sides
    output = tmp_path / "shared.jsonl"
    assert main(["data", "overlap", train, "--with", val, "--output", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exact_pictures"] == {"training": 1, "evaluation": 1}
    assert told["near_pictures"] == {"training": 1, "evaluation": 1}
    assert told["copied_texts"] == {"training": 1, "evaluation": 1}
    assert told["equal_texts"] == {"training": 1, "evaluation": 1}
    assert (told["share"], told["written"]) == (0.75, 3)
    left = open_split(DataOptions(source=train, val=val, exclude=str(output)), "train")
    assert [left.key(i).rpartition(":")[2] for i in range(len(left))] == ["c.png"]
    assert len(open_split(DataOptions(source=train, val=val, exclude=str(output)), "val")) == 4
    keys = excluded_keys(str(output))
    mixed = DataOptions(mixture={"x": {"source": train}, "y": {"source": val}}, exclude=str(output))
    assert len(open_split(mixed, "train")) == 1 + 4
    output.write_text("\n".join(f"x/{key}" for key in keys) + "\n\n")
    assert len(open_split(mixed, "train")) == 1 + 4
    assert main(["data", "overlap", train, "--with", val, "--budget", "0.5"]) == 3
    captured = capsys.readouterr()
    assert "75.00% of the evaluation samples are shared" in captured.err
    assert main(["data", "overlap", train, "--with", val, "--texts", "--output", str(output)]) == 0
    assert len(excluded_keys(str(output))) == 4
    with pytest.raises(DataError, match="all of the 4 samples are excluded"):
        open_split(DataOptions(source=train, exclude=str(output)), "train")


def test_a_file_of_other_keys_is_refused(sides, tmp_path):
    path = tmp_path / "keys"
    for text, said in (("other.tar:1\n", "none of its 1 keys"), ('{"kay": "x"}\n', "keys:1: the line has no key"), ("{broken\n", "cannot be read")):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            open_split(DataOptions(source=sides[0], exclude=str(path)), "train")
    with pytest.raises(DataError, match="No such file"):
        open_split(DataOptions(source=sides[0], exclude=str(tmp_path / "nothing")), "train")
