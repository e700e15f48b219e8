"""Torch operators over the native core; every one has a plain-torch twin (`*_reference`)."""

from vlm.ops import attention_bias, masks
from vlm.ops.alignment import log_alignment_kernel, sequence_alignment
from vlm.ops.alignment_reference import sequence_alignment_reference
from vlm.ops.attention import attention
from vlm.ops.attention_bias import Alibi, BucketBias, GridBias, KeyBias
from vlm.ops.attention_reference import attention_reference
from vlm.ops.attention_varlen import attention_varlen
from vlm.ops.backend import Backend, backend, current_backend
from vlm.ops.block_memory import MemoryRead, MemoryShape, block_memory, block_memory_reference
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.contrastive_listed import likeliest
from vlm.ops.contrastive_matrix import contrastive_matrices
from vlm.ops.contrastive_pairs import Teacher
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.contrastive_ring import ring_contrastive
from vlm.ops.freed_memory import keep_freed_memory
from vlm.ops.late_interaction import late_interaction, select_tokens, take_tokens
from vlm.ops.late_interaction_reference import late_interaction_reference
from vlm.ops.linear_decay import linear_decay
from vlm.ops.linear_decay_reference import linear_decay_reference
from vlm.ops.masks import Alignment, MaskProgram
from vlm.ops.merge import merge_attention
from vlm.ops.merge_reference import merge_attention_reference
from vlm.ops.mutual_guided import mutual_guided
from vlm.ops.selection import BlockList, block_sparse_attention, select_hierarchical
from vlm.ops.self_check import OperatorCheck, self_test
from vlm.ops.ssm_scan import ssm_scan
from vlm.ops.ssm_scan_reference import ssm_scan_reference
from vlm.ops.statistics import (
    Focus,
    RowStatistics,
    attention_column_sums,
    attention_columns,
    attention_entropy,
    attention_focus,
    attention_lse,
    attention_pagerank,
    attention_row_statistics,
    attention_rows,
)
from vlm.ops.tokens import (
    Matching,
    MatchOrder,
    MergeWeighting,
    bipartite_match,
    compose_assignments,
    gather_tokens,
    merge_tokens,
    scatter_tokens,
    unmerge_tokens,
)
from vlm.ops.tokens_pool import (
    ShuffleOrder,
    adaptive_pool,
    pixel_shuffle_permutation,
    pixel_shuffle_tokens,
    pixel_unshuffle_tokens,
    pooling_matrix,
    progressive_pool,
)
from vlm.ops.tokens_select import Selection, select_rows, select_threshold, select_top
from vlm.ops.tokens_stride import StridePool, repeat_frames, stride_pool
from vlm.ops.vocabulary import CrossEntropy, linear_cross_entropy
from vlm.ops.vocabulary_distillation import linear_distillation
from vlm.ops.vocabulary_reference import linear_cross_entropy_reference, linear_distillation_reference
from vlm.ops.window_attention import window_attention
from vlm.ops.window_attention_reference import window_attention_reference

__all__ = [
    "Alibi",
    "Alignment",
    "Backend",
    "BlockList",
    "BucketBias",
    "CrossEntropy",
    "Focus",
    "GridBias",
    "KeyBias",
    "MaskProgram",
    "MatchOrder",
    "Matching",
    "MemoryRead",
    "MemoryShape",
    "MergeWeighting",
    "OperatorCheck",
    "RowStatistics",
    "Selection",
    "ShuffleOrder",
    "StridePool",
    "Teacher",
    "adaptive_pool",
    "attention",
    "attention_bias",
    "attention_column_sums",
    "attention_columns",
    "attention_entropy",
    "attention_focus",
    "attention_lse",
    "attention_pagerank",
    "attention_reference",
    "attention_row_statistics",
    "attention_rows",
    "attention_varlen",
    "backend",
    "bipartite_match",
    "block_memory",
    "block_memory_reference",
    "block_sparse_attention",
    "compose_assignments",
    "contrastive_matrices",
    "contrastive_sigmoid",
    "contrastive_sigmoid_reference",
    "contrastive_softmax",
    "contrastive_softmax_reference",
    "current_backend",
    "gather_tokens",
    "keep_freed_memory",
    "late_interaction",
    "late_interaction_reference",
    "likeliest",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_decay",
    "linear_decay_reference",
    "linear_distillation",
    "linear_distillation_reference",
    "log_alignment_kernel",
    "masks",
    "merge_attention",
    "merge_attention_reference",
    "merge_tokens",
    "mutual_guided",
    "pixel_shuffle_permutation",
    "pixel_shuffle_tokens",
    "pixel_unshuffle_tokens",
    "pooling_matrix",
    "progressive_pool",
    "repeat_frames",
    "ring_contrastive",
    "scatter_tokens",
    "select_hierarchical",
    "select_rows",
    "select_threshold",
    "select_tokens",
    "select_top",
    "self_test",
    "sequence_alignment",
    "sequence_alignment_reference",
    "ssm_scan",
    "ssm_scan_reference",
    "stride_pool",
    "take_tokens",
    "unmerge_tokens",
    "window_attention",
    "window_attention_reference",
]
