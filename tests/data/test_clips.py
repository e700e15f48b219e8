"""Drawn clips and clips in files: twins the other way round, splits apart, frames in order in the batch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm.config.errors import DataError
from vlm.data import DataOptions, build_loader, open_source
from vlm.data.scenes.clips import DIRECTIONS, compose, draw_frames
from vlm.data.scenes.layout import scene_generator
from vlm.runtime.film import film_strip, frames_of, is_clip
from vlm.runtime.preprocess import Preprocess

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def fields_of(uri, count):
    source = open_source(uri)
    return [source.read(i).fields for i in range(count)]


def centre(frame, background):
    """Mean place of what is not background, in shares of the side."""
    ink = np.abs(np.asarray(frame).astype(int) - np.array(background)).sum(-1) > 30
    y, x = np.nonzero(ink)
    return x.mean() / frame.width, y.mean() / frame.height


def test_xclip_a_clip_shows_what_its_caption_says():
    for index in range(40):
        motion = compose(scene_generator(3, index), "train", 8)
        seen = [centre(frame, motion.background) for frame in draw_frames(motion, 32)]
        steps = np.diff(np.array(seen), axis=0).mean(0)
        expected = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion.direction]
        assert np.abs(steps).max() * 7 > 0.3
        assert tuple(np.sign(np.round(steps, 2)).astype(int)) == expected


def test_xclip_the_twin_of_a_clip_is_the_same_frames_the_other_way_round():
    for index in range(20):
        motion = compose(scene_generator(5, index), "train", 8)
        twin = replace(motion, direction=OPPOSITE[motion.direction], track=motion.track[::-1])
        assert twin.concept == motion.concept
        pairs = zip(draw_frames(twin, 16), draw_frames(motion, 16)[::-1], strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    directions = Counter(f["direction"] for f in map(open_source("clips:?n=2000&size=8")._reader.fields, range(2000)))
    assert set(directions) == set(DIRECTIONS)
    assert all(430 < count < 570 for count in directions.values())


def test_clips_are_repeatable_and_splits_share_no_concept_whatever_the_seed():
    one, two = fields_of("clips:?n=6&size=16", 6), fields_of("clips:?n=6&size=16", 6)
    assert all(np.array_equal(np.asarray(a["image"]), np.asarray(b["image"])) for a, b in zip(one, two))
    assert one[0]["image"].size == (8 * 16, 16)
    assert np.array_equal(open_source("clips:?n=5").ids, open_source("clips:?n=50").ids[:5])
    parts = []
    for split, seed in (("train", 0), ("val", 0), ("test", 5)):
        source = open_source(f"clips:?n=300&seed={seed}&split={split}")
        parts.append({source._reader.fields(i)["concept"] for i in range(300)})
    assert not (parts[0] & parts[1])
    assert not (parts[0] & parts[2])
    assert not (parts[1] & parts[2])
    with pytest.raises(DataError, match="known options: n, seed, frames, size, split"):
        open_source("clips:?width=3")


def test_a_strip_keeps_its_frames_and_of_many_some_evenly_spaced():
    frames = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in range(9)]
    strip = film_strip(frames)
    assert is_clip(strip)
    assert strip.size == (36, 4)
    assert [f.getpixel((0, 0))[0] for f in frames_of(strip, 16)] == list(range(9))
    assert [f.getpixel((0, 0))[0] for f in frames_of(strip, 3)] == [1, 4, 7]
    assert not is_clip(frames[0])
    assert frames_of(frames[0], 3) == [frames[0]]
    texted = Image.new("RGB", (4, 4))
    texted.info["frames"] = "a text chunk of a file"
    assert not is_clip(texted)
    with pytest.raises(ValueError, match="no frames"):
        film_strip([])


def loaded(uri, frames, count=4, **image):
    options = DataOptions.model_validate({"source": uri, "image": image})
    with build_loader(options, preprocess=Preprocess(16), batch_size=count, frames=frames) as loader:
        return next(loader)


def test_a_batch_holds_the_frames_of_each_sample_in_order():
    batch = loaded("clips:?n=4&size=16&frames=6", 6)
    stream = batch["image"]
    assert stream.values.shape == (24, 3, 16, 16)
    assert stream.sample_index.tolist() == [b for b in range(4) for _ in range(6)]
    assert stream.slot.tolist() == list(range(6)) * 4
    source = open_source("clips:?n=4&size=16&frames=6")
    index = int(batch.keys[1].rpartition(":")[2])
    expected = frames_of(source.read(index).fields["image"], 6)
    assert all(np.array_equal(stream.values[6 + k].permute(1, 2, 0).numpy(), np.asarray(f)) for k, f in enumerate(expected))
    assert loaded("clips:?n=4&size=16&frames=6", 3)["image"].slot.tolist() == [0, 1, 2] * 4
    assert loaded("scenes:?n=4&size=16", 3)["image"].slot.tolist() == [0] * 4  # a picture is a clip of one frame


def test_the_frames_of_a_clip_are_cropped_alike(tmp_path):
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "noise.png")
    (tmp_path / "still.jsonl").write_text(json.dumps({"image": ["noise.png"] * 3, "caption": "nothing moves"}))
    stream = loaded(str(tmp_path / "still.jsonl"), 3, 1, augment="random-resized-crop", scale=[0.3, 0.5], flip=True)["image"]
    whole = loaded(str(tmp_path / "still.jsonl"), 3, 1)["image"]
    assert all(np.array_equal(stream.values[0], frame) for frame in stream.values)
    assert not np.array_equal(stream.values[0], whole.values[0])


def test_a_list_of_files_is_a_clip_for_a_model_of_clips_alone(tmp_path):
    for k in range(3):
        Image.new("RGB", (16, 16), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
    lines = [{"image": ["0.png", "1.png", "2.png"], "caption": "red grows"}, {"image": ["2.png", "0.png"], "caption": "red falls"}]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    stream = loaded(str(path), 4, 2)["image"]
    found = [stream.values[stream.sample_index == b, 0, 0, 0].tolist() for b in range(2)]
    assert sorted(found, key=len) == [[160, 0], [0, 80, 160]]
    for uri in (str(path), "clips:?n=4&size=16"):
        with pytest.raises(DataError, match="missing_image|clip"):
            loaded(uri, None, 2)
