"""A weight's gradient and its per-example squared norms out of one Triton kernel."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # smallest tile of any configuration of the kernel, in either direction


@torch.compiler.assume_constant_result
def available(device: torch.device | str) -> bool:
    """Whether `outer_sum_and_sq_norms` runs on `device`: an Nvidia GPU of 8.0 or later, and Triton.

    Triton is only looked for here; it is imported by the first call of the kernel.
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def outer_sum_and_sq_norms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """sum_bt left_bt (x) right_bt, [m, n], and |sum_t left_bt (x) right_bt|^2, [B], in float32.

    Sums and squares in float32; float32 factors are multiplied as TF32 where torch's own matrix
    products are. There are no atomics: one configuration gives the same bits every time. Traced by
    torch.compile as one opaque operator; not differentiable.

    The tensor cores do the sum's own 2 B T m n flops and no more: the norms add a square and an
    addition to B m n numbers, about 32 / T of the product's time in bfloat16 on Hopper. That saves
    "gram" its T (m + n) / (m n) of a product, and "direct" a second product and B m n numbers
    written and read. Two accumulators hold tiles to 128 x 128, 128 registers a thread over 8 warps,
    where a plain product has room for 128 x 256: it loses where T << m n / (m + n), and where few
    long examples make too few tiles to fill the GPU.

    Args:
        left: [B, T, m], float32, bfloat16 or float16, of any strides; copied first where m or a
            stride is no multiple of 16.
        right: [B, T, n], likewise.
    """
    return _op(left, right)


# With its schema spelled out, since torch 2.4 cannot infer it from postponed annotations.
@torch.library.custom_op(
    "gnsmon::outer_sum_and_sq_norms",
    mutates_args=(),
    schema="(Tensor left, Tensor right) -> (Tensor, Tensor)",
)
def _op(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    from gnsmon.norms.tiles import outer_tiles

    dtype = torch.promote_types(left.dtype, right.dtype)  # under autocast the two may differ
    assert dtype in (torch.float32, torch.bfloat16, torch.float16), dtype
    m, n = left.shape[2], right.shape[2]
    left, right = _aligned(left.to(dtype)), _aligned(right.to(dtype))
    sizes = (*left.shape, right.shape[2])
    run = _run_length(sizes[0], *sizes[2:], _processors(left.device))
    runs = -(-sizes[0] // run)
    total = left.new_empty(runs, *sizes[2:], dtype=torch.float32)
    # Larger tiles than the smallest leave zeros, which add nothing to the sum.
    partial = left.new_zeros(sizes[0], _tiles(*sizes[2:]), dtype=torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return -(-sizes[2] // meta["TILE_M"]) * -(-sizes[3] // meta["TILE_N"]), runs

    with torch.cuda.device_of(left):
        outer_tiles[grid](
            left, right, total, partial, *sizes, *left.stride()[:2], *right.stride()[:2],
            run, partial.stride(0), _bucket(*sizes[1:]), PRECISION=_precision(),
        )  # fmt: skip
    total = total[0] if runs == 1 else total.sum(0)
    return total[:m, :n].contiguous(), partial.sum(1)


@_op.register_fake
def _(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    total = left.new_empty(left.shape[2], right.shape[2], dtype=torch.float32)
    return total, left.new_empty(left.shape[0], dtype=torch.float32)


def _aligned(t: Tensor) -> Tensor:
    """`t`, or a copy padded with zeros where `t` cannot be loaded 16 bytes at a time.

    Triton knows sizes and strides only as multiples of 16 or not. Numbers loaded one by one would
    need an address each: 128 x 128 tiles then spill hundreds of bytes a thread.
    """
    *outer, inner = t.stride()
    if inner == 1 and t.data_ptr() % 16 == 0 and not any(k % 16 for k in (*outer, t.shape[2])):
        return t
    return F.pad(t, (0, -t.shape[2] % 16)).contiguous()


def _tiles(m: int, n: int) -> int:
    return -(-m // TILE) * -(-n // TILE)


def _run_length(batch: int, m: int, n: int, processors: int) -> int:
    """How many examples one program takes in turn, so that two programs or more fall to each SM.

    Every run holds a total of its own, of at most about 4 processors x TILE x TILE numbers.
    """
    runs = min(max(batch, 1), -(-4 * processors // _tiles(m, n)))
    return max(1, -(-batch // runs))


def _bucket(*sizes: int) -> int:
    """One number for all sizes that round up to the same powers of two."""
    return sum((size - 1).bit_length() << 6 * i for i, size in enumerate(sizes))


def _precision() -> str:
    """How float32 factors are multiplied, which follows torch's setting for its own products."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9, whose `allow_tf32` raises once this is set
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of the CPU, where Triton's interpreter has none to fill, 1."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
