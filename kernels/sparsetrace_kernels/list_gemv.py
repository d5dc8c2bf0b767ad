"""GEMV over lists of kept inputs: y_n = sum_j x_j W_(row_j, n) over the list of n's column segment.

The engine's kernel for one sequence. The lists, and the capture, come from a producer (`add_rmsnorm`, `silu_mul`,
`decode_attention_list`, `compact`), which had to run anyway, so this kernel only gathers weight rows. A list has
sections, one for each program of the producer, none of which waits to learn how many entries lie before its own.
Oracle: `reference.list_gemv_ref`.
No floating-point atomics: sums along the list are added in one fixed order (`partials`).
"""

# Shape suffixes: K = input features, N = output features, S = column segments (1 to 3), I = sections of a list,
# L = room for entries in a section, W = words of `new_partials`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrace_kernels import checks
from sparsetrace_kernels.configs import GemvConfig, config_for, segment_ends
from sparsetrace_kernels.partials import block_of_partials, store_sum
from sparsetrace_kernels.primitives import block_columns, gather_sum, pdl_options, wait_for_producer
from sparsetrace_kernels.sparse_gemv import count_blocks

# each program compares its entries with the ends of all sections
MAX_SECTIONS = 128


@triton.jit(do_not_specialize_on_alignment=["split", "num_sections"])
def _list_kernel(
    lists_ptr,  # [S, I, L] int32
    counts_ptr,  # [S, I] int32
    w_ptr,  # [K, N], row-major
    y_ptr,  # [N]
    partials_ptr,  # [W] int32
    num_sections,
    length,
    N,
    end_0,
    end_1,
    split,
    NUM_SEGMENTS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_k = tl.program_id(1)
    i_segment, o_n, m_n = block_columns(i_n, N, end_0, end_1, NUM_SEGMENTS, BLOCK_N)
    o_i = tl.arange(0, BLOCK_I)
    wait_for_producer(PDL)
    b_counts = tl.load(counts_ptr + i_segment * num_sections + o_i, mask=o_i < num_sections, other=0)
    # programs take tiles in turn, so that all get as many, whatever the counts
    count = tl.sum(b_counts, 0)
    b_y = gather_sum(
        lists_ptr + i_segment * num_sections * length,
        tl.cumsum(b_counts, 0),
        length - b_counts,
        w_ptr,
        i_k * BLOCK_K,
        count,
        split * BLOCK_K,
        N,
        o_n,
        m_n,
        BLOCK_K,
        BLOCK_N,
        NUM_STAGES,
        USE_DOT,
    )
    store_sum(b_y, y_ptr, partials_ptr, i_k, o_n, m_n, N, split, BLOCK_S)


def launch_list_gemv(
    list_SIL: Tensor,
    counts_SI: Tensor,
    weight_KN: Tensor,
    partials_W: Tensor,
    segments: list[int],
    config: GemvConfig,
) -> Tensor:
    """Launch `list_gemv` on checked arguments."""
    N = weight_KN.shape[1]
    _, num_sections, length = list_SIL.shape
    end_0, end_1 = segment_ends(segments, N)
    y_N = torch.empty(N, dtype=weight_KN.dtype, device=weight_KN.device)
    _list_kernel[(count_blocks(segments, config.block_n), config.split)](
        list_SIL, counts_SI, weight_KN, y_N, partials_W, num_sections, length, N, end_0, end_1, config.split,
        NUM_SEGMENTS=len(segments), BLOCK_I=triton.next_power_of_2(num_sections),
        BLOCK_K=config.block_k, BLOCK_N=config.block_n,
        BLOCK_S=block_of_partials(config.block_n, config.num_warps), NUM_STAGES=config.num_stages,
        USE_DOT=config.use_dot, num_warps=config.num_warps, **pdl_options(config.use_pdl),
    )  # fmt: skip
    return y_N


@torch.library.custom_op("sparsetrace::list_gemv", mutates_args=("partials_W",))
def list_gemv(
    list_SIL: Tensor,
    counts_SI: Tensor,
    weight_KN: Tensor,
    partials_W: Tensor,
    segments: list[int],
    config: str | None = None,
) -> Tensor:
    """Multiply the listed inputs by their weight rows.

    Args:
        list_SIL: int32 entries `row << 16 | bit pattern of x`, rows in [0, K), from a producer.
        counts_SI: int32, number of valid entries at the start of each section, at most L.
        weight_KN: weight, input-major and contiguous, fp16 or bf16, whichever the bit patterns in the lists are of.
        partials_W: from `new_partials`, at least split x N words; launches that share them must be on one stream.
        segments: 1 to 3 widths that sum to N.
        config: from `GemvConfig.encode`, kernel `list`; None chooses one for 50 % sparsity.

    Returns:
        y_N: dtype of `weight_KN`; float32 accumulation, error within 2x that of dense torch, bitwise repeatable
        for one config.
    """
    op = "list_gemv"
    if list_SIL.ndim != 3 or not 0 < list_SIL.shape[1] <= MAX_SECTIONS:
        raise ValueError(
            f"{op}: list_SIL must be [S, I, L] with I in [1, {MAX_SECTIONS}], got {tuple(list_SIL.shape)}: "
            "take it from a producer"
        )
    S, num_sections, _ = list_SIL.shape
    device = list_SIL.device
    checks.require(op, "list_SIL", list_SIL, tuple(list_SIL.shape), torch.int32, device)
    checks.require(op, "counts_SI", counts_SI, (S, num_sections), torch.int32, device)
    if weight_KN.dtype not in checks.HALF_TYPES:
        raise ValueError(f"{op}: weight_KN must be fp16 or bf16, got {weight_KN.dtype}")
    K, N = weight_KN.shape if weight_KN.ndim == 2 else (0, 0)
    if not 0 < K <= checks.MAX_LIST_ROWS:
        raise ValueError(
            f"{op}: weight_KN must be [K, N] with K in [1, {checks.MAX_LIST_ROWS}], got {tuple(weight_KN.shape)}: "
            "an entry holds the row in 16 bits"
        )
    checks.require_weight(op, weight_KN, K, weight_KN.dtype, device)
    checks.require_segments(op, segments, N)
    if len(segments) != S:
        raise ValueError(f"{op}: segments must be as many as the lists ({S}), got {list(segments)}")
    chosen = config_for("list", K, N, weight_KN.dtype, config, device)
    if chosen.kernel != "list":
        raise ValueError(f"{op}: config must name kernel list, got {config!r}: use sparse_gemv")
    checks.require_partials(op, partials_W, chosen.split, N, device)
    return launch_list_gemv(list_SIL, counts_SI, weight_KN, partials_W, segments, chosen)


@list_gemv.register_fake
def _(list_SIL, counts_SI, weight_KN, partials_W, segments, config=None):
    return weight_KN.new_empty(weight_KN.shape[1])
