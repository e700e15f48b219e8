"""Bundles whose JSON was altered: one clear error that names what is wrong, or the same answers; never another exception."""

from __future__ import annotations

import copy
import json
import random
import shutil

import pytest

from tests.answering_fixtures import answering_bundle
from tests.bundle_fixtures import exported
from vlm.config.errors import CheckpointError, VlmError
from vlm.export.drawings import drawn_picture
from vlm.runtime import open_any_bundle
from vlm.runtime.chat import Message
from vlm.runtime.generation import Decoding, generate

VALUES = (None, -1, 3.5, [], "xxxxx", 10**30, {}, True)
TRIES = 120
"""Of each file, drawn; all of them were tried once."""


def places(value, path=()):
    """The paths of all values, of lists the first two entries."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*path, key))


def altered(value, path, new):
    """The value with another in one place; KeyError as `new` takes the place out."""
    if not path:
        return new if new is not KeyError else {}
    out = copy.deepcopy(value)
    node = out
    for key in path[:-1]:
        node = node[key]
    if new is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = new
    return out


def used(directory):
    bundle = open_any_bundle(directory, verify=False)
    bundle.self_test()
    if hasattr(bundle, "stepper"):
        shown = [bundle.prepare_image(drawn_picture(20, 20, 1))] if bundle.image_id is not None else []
        generate(bundle, [bundle.prompt([Message("user", ("a",))], shown)], Decoding(max_new_tokens=2))
    else:
        bundle.encode_text(["a"])
        bundle.encode_image([drawn_picture(20, 20, 1)])


@pytest.mark.parametrize("name", ["clip", "language", "prefix", "drop"])
def test_an_altered_value_is_a_clear_error_or_does_not_matter(name, tmp_path):
    source = exported(name)[0] if name in ("clip", "language") else answering_bundle(name)[0]
    bundle = shutil.copytree(source, tmp_path / "bundle")
    draws, refused = random.Random(0), 0
    for file in ("bundle.json", "golden/golden.json"):
        whole = json.loads((bundle / file).read_text())
        whole.pop("parity", None)
        free = [p for p in places(whole) if p[:1] not in (("files",), ("versions",)) and not (p[:1] == ("graphs",) and len(p) > 3)]
        cases = [(path, new) for path in free for new in (*VALUES, KeyError)]
        for path, new in draws.sample(cases, min(TRIES, len(cases))):
            (bundle / file).write_text(json.dumps(altered(whole, path, new)))
            try:
                used(bundle)
            except VlmError as error:
                refused += 1
                assert error.message
        (bundle / file).write_text(json.dumps(whole))
    used(bundle)
    assert refused > TRIES // 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 25}, "the decoder's inputs_embeds is"),
        ({"kv_heads": 3}, r"the decoder's past_key_values\.0\.key is"),
        ({"head_width": 5}, r"the decoder's past_key_values\.0\.key is"),
        ({"layers": 1}, r"decoder\.layers is 1, but the graph has past_key_values\.1"),
        ({"layers": 3}, r"the decoder's graph has no past_key_values\.2"),
        ({"layers": 2.0}, "the table decoder is missing or wrong"),
    ],
)
def test_a_decoder_that_is_not_what_its_graph_is_named(change, message, tmp_path):
    bundle = shutil.copytree(answering_bundle("prefix")[0], tmp_path / "bundle")
    about = json.loads((bundle / "bundle.json").read_text())
    about["decoder"] |= change
    (bundle / "bundle.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=message):
        open_any_bundle(bundle, verify=False).stepper()
