"""Torch operators over the native core; every one has a plain-torch twin (`*_reference`)."""

from vlm.ops.alignment import log_alignment_kernel, sequence_alignment
from vlm.ops.alignment_reference import sequence_alignment_reference
from vlm.ops.attention import Alignment, attention
from vlm.ops.attention_reference import attention_reference
from vlm.ops.backend import Backend, backend, current_backend
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.self_check import OperatorCheck, self_test
from vlm.ops.vocabulary import CrossEntropy, linear_cross_entropy
from vlm.ops.vocabulary_distillation import linear_distillation
from vlm.ops.vocabulary_reference import linear_cross_entropy_reference, linear_distillation_reference

__all__ = [
    "Alignment",
    "Backend",
    "CrossEntropy",
    "OperatorCheck",
    "attention",
    "attention_reference",
    "backend",
    "contrastive_sigmoid",
    "contrastive_sigmoid_reference",
    "contrastive_softmax",
    "contrastive_softmax_reference",
    "current_backend",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_distillation",
    "linear_distillation_reference",
    "log_alignment_kernel",
    "self_test",
    "sequence_alignment",
    "sequence_alignment_reference",
]
