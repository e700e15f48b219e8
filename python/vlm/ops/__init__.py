"""Torch operators over the native core; every one has a plain-torch twin (`*_reference`)."""

from vlm.ops import attention_bias, masks
from vlm.ops.attention import attention
from vlm.ops.attention_bias import Alibi, BucketBias, GridBias, KeyBias
from vlm.ops.attention_reference import attention_reference
from vlm.ops.attention_varlen import attention_varlen
from vlm.ops.backend import Backend, backend, current_backend
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.masks import Alignment, MaskProgram
from vlm.ops.self_check import OperatorCheck, self_test

__all__ = [
    "Alibi",
    "Alignment",
    "Backend",
    "BucketBias",
    "GridBias",
    "KeyBias",
    "MaskProgram",
    "OperatorCheck",
    "attention",
    "attention_bias",
    "attention_reference",
    "attention_varlen",
    "backend",
    "contrastive_sigmoid",
    "contrastive_sigmoid_reference",
    "contrastive_softmax",
    "contrastive_softmax_reference",
    "current_backend",
    "masks",
    "self_test",
]
