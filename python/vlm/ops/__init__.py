"""Torch operators over the native core; every one has a plain-torch twin (`*_reference`)."""

from vlm.ops.attention import Alignment, attention
from vlm.ops.attention_reference import attention_reference
from vlm.ops.backend import Backend, backend, current_backend
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.linear_decay import linear_decay
from vlm.ops.linear_decay_reference import linear_decay_reference
from vlm.ops.selection import BlockList, block_sparse_attention, select_hierarchical
from vlm.ops.self_check import OperatorCheck, self_test
from vlm.ops.ssm_scan import ssm_scan
from vlm.ops.ssm_scan_reference import ssm_scan_reference

__all__ = [
    "Alignment",
    "Backend",
    "BlockList",
    "OperatorCheck",
    "attention",
    "attention_reference",
    "backend",
    "block_sparse_attention",
    "contrastive_sigmoid",
    "contrastive_sigmoid_reference",
    "contrastive_softmax",
    "contrastive_softmax_reference",
    "current_backend",
    "linear_decay",
    "linear_decay_reference",
    "select_hierarchical",
    "self_test",
    "ssm_scan",
    "ssm_scan_reference",
]
