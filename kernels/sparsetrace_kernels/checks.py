"""Checks that the ops share; each raises ValueError with `<op>: <name> must be <rule>, got <value>`."""

# Shape suffixes: K = input features, N = output features, S = column segments, R = ring slots,
# M = bitmask bytes of a row, ceil(K / 8); C = arrival counters, W = words of `new_partials`.  Of attention: B = slots,
# S = cache positions, G = kv heads, D = head dim.

import torch
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)

# a program addresses its tile of rows x N by int32 offsets from an int64 base
MAX_COLUMNS = 1 << 20

# a launch takes one for each slot
MAX_ARRIVALS = 1 << 16

# a list entry holds the row in 16 bits
MAX_LIST_ROWS = 1 << 16


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"


def require(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a tensor that is not contiguous and of exactly this shape, dtype and device."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous {dtype} {shape} on {device}, got {_describe(tensor)}")


def require_half_vector(op: str, name: str, tensor: Tensor) -> None:
    """Refuse anything but a contiguous, nonempty fp16 or bf16 vector."""
    if tensor.ndim != 1 or tensor.numel() == 0 or tensor.dtype not in HALF_TYPES or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be a contiguous, nonempty fp16 or bf16 vector, got {_describe(tensor)}: "
            "fp32 models run on the torch engine"
        )


def require_half_rows(op: str, name: str, rows_TK: Tensor) -> None:
    """Refuse anything but a nonempty fp16 or bf16 matrix with contiguous rows, at any distance from each other."""
    if rows_TK.ndim != 2 or rows_TK.numel() == 0 or rows_TK.dtype not in HALF_TYPES or rows_TK.stride(1) != 1:
        raise ValueError(
            f"{op}: {name} must be a nonempty fp16 or bf16 matrix with contiguous rows, got {_describe(rows_TK)}: "
            "fp32 models run on the torch engine"
        )


def require_like_rows(op: str, name: str, rows_TK: Tensor, like_TK: Tensor) -> None:
    """Refuse rows that differ from others in shape, dtype or device, or that are not contiguous."""
    fits = rows_TK.shape == like_TK.shape and rows_TK.dtype == like_TK.dtype and rows_TK.device == like_TK.device
    if not fits or rows_TK.stride(1) != 1:
        raise ValueError(
            f"{op}: {name} must be {like_TK.dtype} {tuple(like_TK.shape)} with contiguous rows on {like_TK.device}, "
            f"got {_describe(rows_TK)}"
        )


def require_weight(op: str, weight_KN: Tensor, K: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a weight that is not input-major, contiguous and addressable."""
    if weight_KN.ndim != 2 or weight_KN.shape[0] != K or not weight_KN.is_contiguous():
        raise ValueError(
            f"{op}: weight_KN must be contiguous [K={K}, N], got {_describe(weight_KN)}: "
            "a dropped input skips one contiguous row"
        )
    if weight_KN.dtype != dtype or weight_KN.device != device:
        raise ValueError(f"{op}: weight_KN must be {dtype} on {device}, got {_describe(weight_KN)}")
    if not 0 < weight_KN.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"{op}: N must be in [1, {MAX_COLUMNS}], got {weight_KN.shape[1]}")


def require_segments(op: str, segments: list[int], N: int) -> None:
    """Refuse column segments other than 1 to 3 positive widths that fill the weight."""
    if not 1 <= len(segments) <= 3 or min(segments) < 1 or sum(segments) != N:
        raise ValueError(f"{op}: segments must be 1 to 3 positive widths that sum to N={N}, got {list(segments)}")


def require_thresholds(
    op: str, threshold_bits_S: Tensor, scale_SK: Tensor | None, S: int, K: int, device: torch.device
) -> None:
    """Refuse thresholds or score scales that do not fit S segments of K inputs."""
    require(op, "threshold_bits_S", threshold_bits_S, (S,), torch.int32, device)
    if scale_SK is not None:
        require(op, "scale_SK", scale_SK, (S, K), torch.float32, device)


def count_thresholds(op: str, name: str, threshold_bits: Tensor) -> int:
    """Return the number of thresholds, which must be 1 to 3: one for each operand that is made of the input."""
    count = threshold_bits.shape[0] if threshold_bits.ndim == 1 else 0
    if not 1 <= count <= 3:
        raise ValueError(f"{op}: {name} must hold 1 to 3 thresholds, got {tuple(threshold_bits.shape)}")
    return count


def require_one_threshold(op: str, S: int, reader: str) -> None:
    """Refuse several thresholds where only one matrix reads the vector."""
    if S != 1:
        raise ValueError(f"{op}: threshold_bits_S must hold one threshold, got {S}: only {reader}")


def require_slots(
    op: str, name: str, ring: Tensor, S: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a ring whose rows do not fit; strides of slots and segments are free."""
    if ring.ndim != 3 or tuple(ring.shape[1:]) != (S, width) or ring.dtype != dtype or ring.device != device:
        raise ValueError(f"{op}: {name} must be {dtype} [R, {S}, {width}] on {device}, got {_describe(ring)}")
    if ring.stride(2) != 1:
        raise ValueError(f"{op}: {name} must have contiguous rows, got strides {ring.stride()}")


def require_ring(
    op: str,
    values_RSK: Tensor | None,
    mask_RSM: Tensor | None,
    slot: Tensor | None,
    S: int,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse capture rings whose rows do not fit or whose numbers of slots differ, and a slot without a ring."""
    num_slots = None
    for name, ring, width, ring_dtype in (
        ("values_RSK", values_RSK, K, dtype),
        ("mask_RSM", mask_RSM, -(-K // 8), torch.uint8),
    ):
        if ring is None:
            continue
        require_slots(op, name, ring, S, width, ring_dtype, device)
        if num_slots not in (None, ring.shape[0]):
            raise ValueError(f"{op}: mask_RSM must have as many slots as values_RSK ({num_slots}), got {ring.shape[0]}")
        num_slots = ring.shape[0]
    if num_slots is None:
        if slot is not None:
            raise ValueError(f"{op}: slot must be given with a ring only, got {_describe(slot)} and no ring")
    elif slot is None:
        raise ValueError(f"{op}: slot must be given with a ring, got None: it says where the capture goes")
    else:
        require(op, "slot", slot, (1,), torch.int64, device)


def new_arrivals(device: torch.device | str) -> Tensor:
    """Allocate arrival counters, which kernels on one stream may share: int32, zero before and after every launch."""
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


def require_arrivals(op: str, arrivals_C: Tensor, num_counters: int, device: torch.device) -> None:
    """Refuse arrival counters that are too few for the launch."""
    _require_zeros(op, "arrivals_C", arrivals_C, num_counters, f"{num_counters} counters", "new_arrivals", device)


def require_partials(op: str, partials_W: Tensor, num_senders: int, words: int, device: torch.device) -> None:
    """Refuse too few words for `num_senders` programs that send `words` partial results each."""
    wanted = f"{num_senders} x {words} words"
    _require_zeros(op, "partials_W", partials_W, num_senders * words, wanted, "new_partials", device)


def _require_zeros(
    op: str, name: str, zeros: Tensor, least: int, wanted: str, maker: str, device: torch.device
) -> None:
    """Refuse shared zeros of another type or too few; the launches themselves keep them zero."""
    if zeros.ndim != 1 or zeros.dtype != torch.int32 or zeros.device != device:
        raise ValueError(f"{op}: {name} must be an int32 vector on {device}, got {_describe(zeros)}")
    if zeros.shape[0] < least or not zeros.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous with at least {wanted}, got {_describe(zeros)}: make them with {maker}"
        )


def require_cache(op: str, keys_BSGD: Tensor, values_BSGD: Tensor) -> None:
    """Refuse a layer's cache whose heads cannot be rotated or are not contiguous; the other strides are free."""
    if keys_BSGD.dtype not in HALF_TYPES:
        raise ValueError(
            f"{op}: keys_BSGD must be fp16 or bf16, got {_describe(keys_BSGD)}: fp32 models run on the torch engine"
        )
    if keys_BSGD.ndim != 4 or keys_BSGD.numel() == 0 or keys_BSGD.shape[3] % 2 or keys_BSGD.stride(3) != 1:
        raise ValueError(
            f"{op}: keys_BSGD must be a nonempty [B, S, G, D] with D even and contiguous, got {_describe(keys_BSGD)}"
        )
    expected = (keys_BSGD.shape, keys_BSGD.dtype, keys_BSGD.device, 1)
    if (values_BSGD.shape, values_BSGD.dtype, values_BSGD.device, values_BSGD.stride(-1)) != expected:
        raise ValueError(
            f"{op}: values_BSGD must be {keys_BSGD.dtype} {tuple(keys_BSGD.shape)} on {keys_BSGD.device} with "
            f"D contiguous, got {_describe(values_BSGD)}"
        )


def ring_arguments(
    values_RSK: Tensor | None, mask_RSM: Tensor | None, slot: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int, int, int, int]:
    """Lay a checked ring out as `primitives.RingArguments`: pointers, number of slots, strides in elements."""
    ring = values_RSK if values_RSK is not None else mask_RSM
    return (
        values_RSK,
        mask_RSM,
        slot,
        0 if ring is None else ring.shape[0],
        0 if values_RSK is None else values_RSK.stride(0),
        0 if values_RSK is None else values_RSK.stride(1),
        0 if mask_RSM is None else mask_RSM.stride(0),
        0 if mask_RSM is None else mask_RSM.stride(1),
    )
