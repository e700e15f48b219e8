"""The preprocessing of a bundle as an ONNX graph: uint8 pixels of any size in, the model's input out.

h, w the picture's height and width, S side of the model's input. The resize works on uint8 and is separable: one axis,
round, the other, round, in Pillow's order. It differs from Pillow's by at most one level of 255, in few values, except
in pictures more than LONGEST times as long as wide, whose ends are cut first.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vlm.runtime.preprocess import Preprocess

LONGEST = 64
"""Aspect ratio beyond which the graph keeps only the middle of the long side, so that memory stays bounded."""


class _Graph:
    """Collects nodes; every method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"n_{name}", **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(value, dtype)
        name = f"c_{array.dtype.name}_" + "_".join(str(v) for v in array.ravel().tolist()) + f"_{array.ndim}"
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(list(values))


def preprocess_graph(preprocess: Preprocess, *, opset: int = 18) -> onnx.ModelProto:
    """`picture` uint8 [h, w, 3] -> `pixel_values` float32 [3, S, S], as `Preprocess.to_array` and `normalise` give."""
    g = _Graph()
    size = preprocess.size
    chw = g.op("Unsqueeze", g.op("Transpose", "picture", perm=[2, 0, 1]), g.ints(0))
    if preprocess.resize == "squash":
        x = _resize(g, chw, g.ints(size), g.ints(size), preprocess)
    elif preprocess.resize == "shortest":
        x = _shortest(g, _middle(g, chw), preprocess)
    else:
        x = _pad(g, chw, preprocess)
    unit = g.op("Div", g.op("Cast", x, to=TensorProto.FLOAT), g.constant(255, np.float32))
    mean = g.constant(np.reshape(preprocess.mean, (1, 3, 1, 1)), np.float32)
    std = g.constant(np.reshape(preprocess.std, (1, 3, 1, 1)), np.float32)
    out = g.op("Squeeze", g.op("Div", g.op("Sub", unit, mean), std), g.ints(0))
    # The static shape is known here and nowhere else in the graph.
    g.nodes.append(helper.make_node("Reshape", [out, g.ints(3, size, size)], ["pixel_values"], name="n_pixel_values"))
    graph = helper.make_graph(
        g.nodes,
        "preprocess",
        [helper.make_tensor_value_info("picture", TensorProto.UINT8, ["height", "width", 3])],
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [3, size, size])],
        list(g.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="vlm", ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _sides(g: _Graph, x: str) -> tuple[str, str]:
    """(h, w) of [1, 3, h, w], each int64 [1]."""
    return g.op("Shape", x, start=2, end=3), g.op("Shape", x, start=3, end=4)


def _resize(g: _Graph, x: str, height: str, width: str, preprocess: Preprocess) -> str:
    """Antialiased resize of uint8 [1, 3, h, w], one axis after the other, rounded to 8 bits between them."""
    attributes: dict[str, Any] = {"antialias": 1, "coordinate_transformation_mode": "half_pixel", "exclude_outside": 1}
    if preprocess.interpolation == "bicubic":
        attributes |= {"mode": "cubic", "cubic_coeff_a": -0.5}
    else:
        attributes |= {"mode": "linear"}
    h, w = _sides(g, x)
    first_h, first_w = h, width
    if pillow_may_take_height_first():
        lost_h, lost_w = g.op("Sub", h, height), g.op("Sub", w, width)
        much = g.op("Greater", lost_h, g.op("Mul", lost_w, g.ints(2)))
        height_first = g.op("And", much, g.op("Greater", lost_h, g.ints(0)))
        first_h = g.op("Where", height_first, height, h)
        first_w = g.op("Where", height_first, w, width)
    for sides in ((first_h, first_w), (height, width)):
        x = g.op("Resize", x, "", "", g.op("Concat", g.ints(1, 3), *sides, axis=0), **attributes)
    return x


@functools.cache
def pillow_may_take_height_first() -> bool:
    """Whether the installed Pillow resizes the height first when it loses more than twice what the width loses.

    Releases before 13 always take the width first; the graph must follow the one that training used.
    """
    noise = np.random.default_rng(0).integers(0, 256, (96, 33)).astype(np.uint8)
    picture, cubic = Image.fromarray(noise), Image.Resampling.BICUBIC
    width_first = picture.resize((32, 96), cubic).resize((32, 32), cubic)
    return not np.array_equal(np.asarray(picture.resize((32, 32), cubic)), np.asarray(width_first))


def _crop(g: _Graph, x: str, height: str, width: str) -> str:
    """The middle of [1, 3, h, w], rounded to the upper left; height and width at most h and w."""
    h, w = _sides(g, x)
    two = g.ints(2)
    top = g.op("Div", g.op("Sub", h, height), two)
    left = g.op("Div", g.op("Sub", w, width), two)
    start = g.op("Concat", top, left, axis=0)
    end = g.op("Concat", g.op("Add", top, height), g.op("Add", left, width), axis=0)
    return g.op("Slice", x, start, end, g.ints(2, 3))


def _middle(g: _Graph, x: str) -> str:
    h, w = _sides(g, x)
    most = g.op("Mul", g.op("Min", h, w), g.ints(LONGEST))
    return _crop(g, x, g.op("Min", h, most), g.op("Min", w, most))


def _shortest(g: _Graph, x: str, preprocess: Preprocess) -> str:
    h, w = _sides(g, x)
    size = g.ints(preprocess.size)
    short = g.op("Min", h, w)
    # Whole-number division: the shorter side becomes exactly S, the longer one is rounded down.
    height = g.op("Div", g.op("Mul", h, size), short)
    width = g.op("Div", g.op("Mul", w, size), short)
    return _crop(g, _resize(g, x, height, width, preprocess), size, size)


def _pad(g: _Graph, x: str, preprocess: Preprocess) -> str:
    h, w = _sides(g, x)
    one, two, size = g.ints(1), g.ints(2), g.ints(preprocess.size)
    # In float64, in the order of Preprocess.to_array: rounding down may lose a pixel, and must lose the same one.
    side = g.constant([float(preprocess.size)], np.float64)
    wide, high = (g.op("Cast", v, to=TensorProto.DOUBLE) for v in (w, h))
    scale = g.op("Min", g.op("Div", side, wide), g.op("Div", side, high))
    height, width = (
        g.op("Max", g.op("Cast", g.op("Mul", v, scale), to=TensorProto.INT64), one) for v in (high, wide)
    )
    inside = _resize(g, x, height, width, preprocess)
    free_h, free_w = g.op("Sub", size, height), g.op("Sub", size, width)
    top, left = (g.op("Div", g.op("Add", v, one), two) for v in (free_h, free_w))
    bottom, right = g.op("Sub", free_h, top), g.op("Sub", free_w, left)
    pads = g.op("Concat", g.ints(0, 0), top, left, g.ints(0, 0), bottom, right, axis=0)
    return g.op("Pad", inside, pads, g.constant(0, np.uint8))
