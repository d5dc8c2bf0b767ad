"""Oracles for the kernels in this folder: the same contracts in plain torch, in float64 or one row at a time.

Only tests and benchmarks call them. This module imports torch only, so it runs on any device, also where Triton is not
installed.
"""

# Shape suffixes: K = input features, N = output features, T = tokens, S = column segments, I = sections of a list,
# L = inputs of a section, R = ring slots, n = rows of a pass.  Of attention: B = slots, H = query heads, G = kv heads,
# D = head dim, S = cache positions, P = rows of the rotary tables, E = D / 2.  Of a decoding step: B = slots,
# P = positions, V = end tokens.

import torch
from torch import Tensor

from sparsetrace_kernels.torch_ops import DENSE, keep_above, magnitude_bits, mask_operand, pack_bits


def keep_segments(x_K: Tensor, threshold_bits_S: Tensor, scale_SK: Tensor | None = None) -> Tensor:
    """Return which inputs each column segment keeps: those that are not zero and whose score is above the threshold.

    Args:
        x_K: inputs, fp16 or bf16.
        threshold_bits_S: int32 bit patterns, of the dtype of `x_K`, or of float32 where `scale_SK` is given;
            a negative threshold counts as 0.
        scale_SK: float32 score scale; the score is |x| * scale in float32, rounded once.

    Returns:
        keep_SK, bool.
    """
    score_SK = x_K[None, :] if scale_SK is None else x_K.float().abs()[None, :] * scale_SK
    return keep_above(score_SK, threshold_bits_S[:, None].clamp(min=0)) & (x_K != 0)


def sparse_gemv_ref(
    x_K: Tensor, weight_KN: Tensor, threshold_bits_S: Tensor, segments: list[int], scale_SK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `sparse_gemv`, accumulated in float64.

    Returns:
        y_N: float64.
        operand_SK: dtype of `x_K`; what must be captured.
        mask_SM: uint8, bitmask of the operand, M = ceil(K / 8).
    """
    keep_SK = keep_segments(x_K, threshold_bits_S, scale_SK)
    operand_SK = mask_operand(x_K.expand_as(keep_SK), keep_SK)
    columns = weight_KN.double().split(segments, dim=1)
    y_N = torch.cat([operand_K.double() @ w for operand_K, w in zip(operand_SK, columns, strict=True)])
    return y_N, operand_SK, pack_bits(keep_SK)


def compact_ref(
    x_K: Tensor, threshold_bits_S: Tensor, scale_SK: Tensor | None = None, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as `compact`, with zeros behind the counts.

    Args:
        x_K, threshold_bits_S, scale_SK: as `compact` takes them.
        length: inputs of a section; None makes one section.

    Returns:
        list_SIL: int32, `row << 16 | bit pattern of x`, rows ascending.
        counts_SI: int32, the number of valid entries.
    """
    keep_SK = keep_segments(x_K, threshold_bits_S, scale_SK)
    K = x_K.shape[0]
    length = length or K
    rows_K = torch.arange(K, device=x_K.device)
    entries_K = (rows_K << 16) | (x_K.view(torch.int16).long() & 0xFFFF)
    # the 32nd bit of the row wraps into the sign
    entries_K = torch.where(entries_K >= 2**31, entries_K - 2**32, entries_K).int()
    list_SIL = keep_SK.new_zeros(len(keep_SK), -(-K // length), length, dtype=torch.int32)
    counts_SI = keep_SK.new_zeros(list_SIL.shape[:2], dtype=torch.int32)
    for s, keep_K in enumerate(keep_SK):
        for i, start in enumerate(range(0, K, length)):
            kept = entries_K[start : start + length][keep_K[start : start + length]]
            list_SIL[s, i, : kept.shape[0]] = kept
            counts_SI[s, i] = kept.shape[0]
    return list_SIL, counts_SI


def mask_rows_ref(
    x_TK: Tensor,
    threshold_bits_S: Tensor,
    scale_SK: Tensor | None,
    dest_T: Tensor,
    values_RSK: Tensor | None,
) -> Tensor:
    """Same contract as `mask_rows`, one row at a time."""
    operand_STK = x_TK.new_empty(len(threshold_bits_S), *x_TK.shape)
    for t, dest in enumerate(dest_T.tolist()):
        keep_SK = keep_segments(x_TK[t], threshold_bits_S, scale_SK)
        operand_STK[:, t] = x_TK[t] if dest == DENSE else mask_operand(x_TK[t].expand_as(keep_SK), keep_SK)
        if values_RSK is not None and 0 <= dest < values_RSK.shape[0]:
            values_RSK[dest] = operand_STK[:, t]
    return operand_STK


def list_gemv_ref(list_SIL: Tensor, counts_SI: Tensor, weight_KN: Tensor, segments: list[int]) -> Tensor:
    """Same contract as `list_gemv`, accumulated in float64; returns y_N, float64."""
    columns = []
    for list_IL, counts_I, w in zip(
        list_SIL, counts_SI.tolist(), weight_KN.double().split(segments, dim=1), strict=True
    ):
        entries = torch.cat([list_L[:count] for list_L, count in zip(list_IL, counts_I, strict=True)])
        x = (entries & 0xFFFF).to(torch.int32).to(torch.int16).view(weight_KN.dtype)
        rows = (entries >> 16) & 0xFFFF
        columns.append(x.double() @ w[rows.long()])
    return torch.cat(columns)


def add_rmsnorm_ref(
    residual_K: Tensor, delta_K: Tensor | None, norm_weight_K: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual, round the sum as it is stored, and apply RMSNorm to it in float64.

    Returns:
        residual_K: the sum, rounded to the dtype of the inputs, as it is stored.
        normed_K: float64, computed from the rounded sum without further rounding.
    """
    total_K = residual_K if delta_K is None else (residual_K.float() + delta_K.float()).to(residual_K.dtype)
    exact_K = total_K.double()
    return total_K, exact_K * torch.rsqrt(exact_K.square().mean() + eps) * norm_weight_K.double()


def silu_mul_ref(gate_up_K2: Tensor) -> Tensor:
    """SiLU(gate) * up in float64; gate and up are the two halves of the last dim."""
    gate_K, up_K = gate_up_K2.double().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_K) * up_K


def place_rows_ref(
    chosen_n: Tensor,
    positions_n: Tensor,
    bases_n: Tensor,
    numbers_n: Tensor,
    every: int,
    labels_R3: Tensor,
    filled: Tensor,
) -> Tensor:
    """Same contract as `place_rows`, one row at a time."""
    nowhere = labels_R3.shape[0] - 1
    rows_n = torch.full_like(positions_n, nowhere)
    for i, (chosen, position) in enumerate(zip(chosen_n.tolist(), positions_n.tolist(), strict=True)):
        if chosen and position % every == 0:
            rows_n[i] = filled[0]
            if filled[0] < nowhere:
                labels_R3[filled[0]] = torch.stack([bases_n[i] + position, numbers_n[i], positions_n[i]])
            filled += 1
    return rows_n


def advance_ref(
    next_B: Tensor,
    finite_B: Tensor,
    eos_V: Tensor,
    limits_B: Tensor,
    chosen_PB: Tensor,
    count: Tensor,
    tokens_B: Tensor,
    running_B: Tensor,
    all_finite_B: Tensor,
) -> None:
    """Same contract as `advance`, one slot at a time."""
    end_tokens, row = eos_V.tolist(), int(count)
    for b, token in enumerate(next_B.tolist()):
        chosen_PB[row, b] = tokens_B[b] = token
        if running_B[b] and not finite_B[b]:
            all_finite_B[b] = False
        if token in end_tokens or row + 1 >= limits_B[b]:
            running_B[b] = False
    count += 1


def rotate_rows_ref(
    qkv_nN: Tensor, cos_PE: Tensor, sin_PE: Tensor, positions_n: Tensor, G: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate as `rotate_rows` does, for positions inside the cache; returns q [n, H D], k and v [n, G, D]."""
    D = 2 * cos_PE.shape[1]
    q_nHD, k_nGD, v_nGD = qkv_nN.unflatten(1, (-1, D)).tensor_split((-2 * G, -G), dim=1)
    cos_n1E, sin_n1E = cos_PE[positions_n, None], sin_PE[positions_n, None]
    return _rotate(q_nHD, cos_n1E, sin_n1E).flatten(1), _rotate(k_nGD, cos_n1E, sin_n1E), v_nGD


def _rotate(x_nHD: Tensor, cos_n1E: Tensor, sin_n1E: Tensor) -> Tensor:
    low, high = x_nHD.chunk(2, dim=-1)
    return torch.cat((low * cos_n1E + -high * sin_n1E, high * cos_n1E + low * sin_n1E), dim=-1)


def decode_attention_ref(
    qkv_BN: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    positions_B: Tensor,
    keys_BSGD: Tensor,
    values_BSGD: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `decode_attention`: rotation in the dtype, attention in float64; the cache is not written.

    Returns:
        y_BN: [B, H D] float64.
        keys_BGD: dtype of `qkv_BN`, the rotated keys that the cache must receive.
        values_BGD: the values that it must receive.
    """
    _, S, G, D = keys_BSGD.shape
    q_BHD, k_BGD, values_BGD = qkv_BN.unflatten(1, (-1, D)).tensor_split((-2 * G, -G), dim=1)
    rows_B = positions_B.clamp(0, cos_PE.shape[0] - 1)
    tables = cos_PE[rows_B, None], sin_PE[rows_B, None]
    q_BHD, keys_BGD = _rotate(q_BHD, *tables), _rotate(k_BGD, *tables)
    y = []
    for b, position in enumerate(positions_B.tolist()):
        first = max(0, position - window + 1) if window else 0
        cached = slice(first, max(0, min(position, S)))
        k_SGD = torch.cat((keys_BSGD[b, cached], keys_BGD[b : b + 1])).double()
        v_SGD = torch.cat((values_BSGD[b, cached], values_BGD[b : b + 1])).double()
        q_GRD = q_BHD[b].double().unflatten(0, (G, -1))
        p_GRS = (torch.einsum("grd,sgd->grs", q_GRD, k_SGD) * D**-0.5).softmax(-1)
        y.append(torch.einsum("grs,sgd->grd", p_GRS, v_SGD).flatten())
    return torch.stack(y), keys_BGD, values_BGD


def pack_ref(x_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `pack`, but `values` is as long as the number of kept entries.

    Returns:
        mask_TM: uint8.
        values: int16 (int32 for fp32) bit patterns of the nonzero entries, row by row.
        offsets: [T + 1] int64, where each row starts in `values`, and the end.
    """
    keep_TK = magnitude_bits(x_TK) != 0
    bits_TK = x_TK.view(magnitude_bits(x_TK).dtype)
    offsets = torch.zeros(x_TK.shape[0] + 1, dtype=torch.int64, device=x_TK.device)
    offsets[1:] = keep_TK.sum(1).cumsum(0)
    return pack_bits(keep_TK), bits_TK[keep_TK], offsets


def pack_regions_ref(
    bits_flat: Tensor, widths: list[int], capacity: int, rows: int, num_rows: int, infinity: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Same contract as `pack_regions`, but each output is as long as its contents.

    Returns:
        packed: dtype of `bits_flat`.
        masks: uint8, region by region.
        row_starts: [len(widths) * rows + 1] int64.
        nonfinite: whether a used row holds a magnitude of `infinity` or above.
    """
    packed, masks, counts = [], [], [torch.zeros(1, dtype=torch.int64, device=bits_flat.device)]
    nonfinite = False
    for region in bits_flat[: capacity * sum(widths)].split([capacity * K for K in widths]):
        bits_TK = region.view(capacity, -1)[:rows].clone()
        bits_TK[num_rows:] = 0
        magnitude_TK = bits_TK & torch.iinfo(bits_TK.dtype).max
        keep_TK = magnitude_TK != 0
        packed.append(bits_TK[keep_TK])
        masks.append(pack_bits(keep_TK).flatten())
        counts.append(keep_TK.sum(1))
        nonfinite |= bool((magnitude_TK >= infinity).any())
    return torch.cat(packed), torch.cat(masks), torch.cat(counts).cumsum(0), nonfinite


def histogram_ref(x: Tensor) -> Tensor:
    """Count each of the 65,536 bit patterns of a 16-bit tensor: int64, indexed by the unsigned pattern."""
    return torch.bincount(x.flatten().view(torch.int16).long() & 0xFFFF, minlength=1 << 16)
