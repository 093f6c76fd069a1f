"""Every configuration of the Triton kernel under Triton's interpreter: TRITON_INTERPRET=1."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gnsmon.norms import kernels, tiles

SHAPES = [  # B, T, m, n
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (1, 64, 64, 128),
    (2, 33, 130, 65),
    (2, 70, 20, 300),
]


def check(left, right):
    total, sq_norms = kernels.outer_sum_and_sq_norms(left, right)
    each = torch.einsum("bti,btj->bij", left.double(), right.double())
    terms = torch.einsum("bti,btj->ij", left.double().abs(), right.double().abs())
    assert total.dtype == sq_norms.dtype == torch.float32
    assert total.is_contiguous()
    assert bool(((total - each.sum(0)).abs() <= 1e-6 * terms).all())  # products are exact or nearly
    torch.testing.assert_close(sq_norms.double(), each.square().sum((1, 2)), rtol=1e-5, atol=0)


def as_written(left, right):
    return left, right


def out_of_place(left, right):  # no stride as in a contiguous tensor
    wide = torch.full((left.shape[2], left.shape[0], 2 * left.shape[1]), torch.nan).to(left)
    wide[..., ::2] = left.permute(2, 0, 1)
    return wide[..., ::2].permute(1, 2, 0), right.transpose(0, 1).contiguous().transpose(0, 1)


def expanded(left, right):  # a stride of zero, as `sum().backward()` makes
    return left[:, :1].expand_as(left), right


def of_two_dtypes(left, right):
    return left.float(), right


def main():
    torch.manual_seed(0)
    for config in tiles.CONFIGS:
        tiles.outer_tiles.configs = [config]  # one is taken as it is; to time several needs a GPU
        for shape in SHAPES:
            check(*factors(*shape))
        check(*(t.bfloat16() for t in factors(2, 70, 70, 130)))

    tiles.outer_tiles.configs = tiles.CONFIGS[:1]
    check(*factors(150, 3, 10, 20))  # more examples than programs, and a shorter last run
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for made in (as_written, out_of_place, expanded, of_two_dtypes):
            check(*made(*(t.to(dtype) for t in factors(3, 40, 70, 50))))
    empty = kernels.outer_sum_and_sq_norms(*factors(4, 0, 8, 5))
    assert not any(t.any() for t in empty)
    trace()
    tune()


def factors(batch, positions, m, n):
    return torch.randn(batch, positions, m), torch.randn(batch, positions, n)


def trace():
    """One operator of a graph, also of one for any batch."""
    left, right = factors(4, 6, 8, 5)
    torch.library.opcheck(torch.ops.gnsmon.outer_sum_and_sq_norms.default, (left, right))
    compiled = torch.compile(
        kernels.outer_sum_and_sq_norms, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (4, 3):
        for got, want in zip(
            compiled(left[:batch], right[:batch]),
            kernels.outer_sum_and_sq_norms(left[:batch], right[:batch]),
            strict=True,
        ):
            assert torch.equal(got, want)


def tune():
    """What other configurations leave behind while they are timed is not in the result."""
    timed = []

    def time_of_a_run(run, quantiles):
        run()
        timed.append(run)
        return [-len(timed)] * len(quantiles)  # the last and largest tiles win

    tuner = tiles.outer_tiles
    tuner.configs, tuner._do_bench = tiles.CONFIGS, time_of_a_run
    for batch, positions in ((2, 40), (5, 40), (3, 60)):  # all in one bucket
        check(*factors(batch, positions, 70, 130))
    assert len(timed) == len(tiles.CONFIGS)
    assert tuner.best_config is tiles.CONFIGS[-1]
    check(*factors(2, 100, 70, 130))
    assert len(timed) == 2 * len(tiles.CONFIGS)


def dot_of_bfloat16(self, a, b, d, *args, dot=InterpreterBuilder.create_dot):
    """Triton 3.7's interpreter multiplies bfloat16's bit patterns as though they were integers."""

    def widened(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return dot(self, widened(a), widened(b), d, *args)


if __name__ == "__main__":
    InterpreterBuilder.create_dot = dot_of_bfloat16
    main()
