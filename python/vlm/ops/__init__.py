"""Torch operators over the native core; every one has a plain-torch twin (`*_reference`)."""

from vlm.ops.attention import Alignment, attention
from vlm.ops.attention_reference import attention_reference
from vlm.ops.backend import Backend, backend, current_backend
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.contrastive_matrix import contrastive_matrices
from vlm.ops.contrastive_pairs import Teacher
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.contrastive_ring import ring_contrastive
from vlm.ops.late_interaction import late_interaction, select_tokens, take_tokens
from vlm.ops.late_interaction_reference import late_interaction_reference
from vlm.ops.mutual_guided import mutual_guided
from vlm.ops.self_check import OperatorCheck, self_test

__all__ = [
    "Alignment",
    "Backend",
    "OperatorCheck",
    "Teacher",
    "attention",
    "attention_reference",
    "backend",
    "contrastive_matrices",
    "contrastive_sigmoid",
    "contrastive_sigmoid_reference",
    "contrastive_softmax",
    "contrastive_softmax_reference",
    "current_backend",
    "late_interaction",
    "late_interaction_reference",
    "mutual_guided",
    "ring_contrastive",
    "select_tokens",
    "self_test",
    "take_tokens",
]
