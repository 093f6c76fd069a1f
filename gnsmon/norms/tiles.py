"""The Triton kernel behind `kernels`, which alone imports this file: Triton is optional."""

import triton
import triton.language as tl

# (TILE_M, TILE_N, TILE_T), warps, stages. Two float32 accumulators take 2 TILE_M TILE_N / (32
# warps) registers a thread, of 255. What exceeds a GPU's shared memory the tuner leaves out.
CONFIGS = [
    triton.Config(
        {"TILE_M": m, "TILE_N": n, "TILE_T": t}, num_warps=warps, num_stages=stages
    )
    for m, n, t, warps, stages in [
        (64, 64, 32, 4, 4),
        (64, 128, 32, 4, 4),
        (64, 128, 64, 4, 3),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
    ]
]  # fmt: skip


@triton.autotune(CONFIGS, key=["bucket", "PRECISION"], reset_to_zero=["partial"])
@triton.jit(do_not_specialize=["batch", "positions", "run", "bucket"])
def outer_tiles(
    left, right, total, partial,
    batch, positions, m, n,
    left_b, left_t, right_b, right_t,
    run, partial_b, bucket,
    PRECISION: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient, summed over a run of examples, and its share of their norms.

    left [batch, positions, m] and right [batch, positions, n] with the strides given and 1; total
    [runs, m, n] and partial [batch, at least as many as tiles], zeros, are float32.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    columns = tl.cdiv(n, TILE_N)
    i = tile // columns * TILE_M + tl.arange(0, TILE_M)
    j = tile % columns * TILE_N + tl.arange(0, TILE_N)
    t = tl.arange(0, TILE_T)
    # 64 bits: a batch of logits' gradients has more than 2^31 numbers.
    left_at = left + i[:, None] + t.to(tl.int64)[None, :] * left_t
    right_at = right + t.to(tl.int64)[:, None] * right_t + j[None, :]
    left_in, right_in = (i < m)[:, None], (j < n)[None, :]

    first = part * run
    steps = tl.cdiv(positions, TILE_T)
    example = tl.zeros((TILE_M, TILE_N), tl.float32)
    summed = tl.zeros((TILE_M, TILE_N), tl.float32)
    # One loop over examples and positions, so that loads run ahead from one example to the next.
    for step in range(steps * (tl.minimum(first + run, batch) - first)):
        b = (first + step // steps).to(tl.int64)
        start = (step % steps * TILE_T).to(tl.int64)
        there = (t < positions - start)[None, :]
        a = tl.load(left_at + (b * left_b + start * left_t), left_in & there, other=0.0)
        x = tl.load(right_at + (b * right_b + start * right_t), there.T & right_in, other=0.0)
        example = tl.dot(a, x, example, input_precision=PRECISION)
        if start + TILE_T >= positions:
            summed += example
            tl.store(partial + b * partial_b + tile, tl.sum(example * example))
            example = tl.zeros((TILE_M, TILE_N), tl.float32)

    at = (part.to(tl.int64) * m + i[:, None]) * n + j[None, :]
    tl.store(total + at, summed, mask=left_in & right_in)
