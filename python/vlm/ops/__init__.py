"""Torch operators over the native core; every one has a plain-torch twin (`*_reference`)."""

from vlm.ops.attention import Alignment, attention
from vlm.ops.attention_reference import attention_reference
from vlm.ops.backend import Backend, backend, current_backend
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.self_check import OperatorCheck, self_test
from vlm.ops.window_attention import window_attention
from vlm.ops.window_attention_reference import window_attention_reference

__all__ = [
    "Alignment",
    "Backend",
    "OperatorCheck",
    "attention",
    "attention_reference",
    "backend",
    "contrastive_sigmoid",
    "contrastive_sigmoid_reference",
    "contrastive_softmax",
    "contrastive_softmax_reference",
    "current_backend",
    "self_test",
    "window_attention",
    "window_attention_reference",
]
