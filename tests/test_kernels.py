import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gnsmon.norms import kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not kernels.available("cuda"),
    reason="needs an Nvidia GPU of capability 8.0 and Triton",
)


def test_the_cpu_has_no_kernel():
    assert not kernels.available("cpu")


def test_without_triton_no_device_has_one(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not kernels.available("cuda")


def test_shapes_are_known_without_running():
    with FakeTensorMode():
        left, right = torch.empty(3, 5, 7, dtype=torch.bfloat16), torch.empty(3, 5, 9)
        total, sq_norms = kernels.outer_sum_and_sq_norms(left, right)
    assert (total.shape, total.dtype) == ((7, 9), torch.float32)
    assert (sq_norms.shape, sq_norms.dtype) == ((3,), torch.float32)


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (64, 64), (768, 3072), (50257, 768)])
def test_runs_fill_the_gpu_and_waste_little(batch, m, n, processors):
    run = kernels._run_length(batch, m, n, processors)
    runs, tiles = -(-batch // run), kernels._tiles(m, n)
    assert 1 <= run <= batch
    assert runs * tiles < 4 * processors + tiles  # what the totals may hold
    assert run == 1 or 2 * runs * tiles >= 4 * processors  # half the aim, lost to rounding


def test_only_what_cannot_be_loaded_16_bytes_at_a_time_is_copied():
    t = torch.randn(3, 5, 32)
    for fine in (t, t.transpose(0, 1), t[..., 16:], t[:, :1].expand_as(t)):
        assert kernels._aligned(fine) is fine
    for other in (t[..., 1:17], t[..., ::2], t[..., :1].expand_as(t), torch.randn(3, 5, 30)):
        copy, width = kernels._aligned(other), other.shape[2]
        assert copy.is_contiguous() and copy.shape[2] % 16 == 0
        assert torch.equal(copy[..., :width], other) and not copy[..., width:].any()


def test_no_new_timing_for_a_similar_size():
    assert kernels._bucket(1000, 768, 3072) == kernels._bucket(1024, 600, 4096)
    sizes = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2**40, 1), (1, 2**41, 1)]
    assert len({kernels._bucket(*each) for each in sizes}) == len(sizes)


def test_products_are_in_the_precision_of_torch_s_own():
    code = (
        "import torch; from gnsmon.norms.kernels import _precision as p\n"
        "assert p() == 'ieee'; torch.set_float32_matmul_precision('high'); assert p() == 'tf32'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@needs_triton
def test_interpreted_kernel():
    subprocess.run(
        [sys.executable, "-W", "error", Path(__file__).with_name("kernels_worker.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
    )


@needs_triton
@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize(("capability", "product"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_compiled_kernel_keeps_its_accumulators_in_registers(tmp_path, index, capability, product):
    """Compiled for a GPU that need not be there: tensor cores, asynchronous loads, no spills."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gnsmon.norms import tiles

    config, kernel = tiles.CONFIGS[index], tiles.outer_tiles.fn
    pointers = {"left": "*bf16", "right": "*bf16", "total": "*fp32", "partial": "*fp32"}
    constants = {**config.kwargs, "PRECISION": "ieee"}
    aligned = {*pointers, "m", "n", "left_b", "left_t", "right_b", "right_t"}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={k: "constexpr" if k in constants else pointers.get(k, "i32") for k in names},
        constexprs=constants,
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options=options).asm["ptx"]
    assert product in ptx
    assert "cp.async" in ptx

    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "kernel.ptx", "-o", "kernel.cubin"]
    command.append("-arch=" + re.search(r"\.target (\w+)", ptx)[1])
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "0 bytes spill stores, 0 bytes spill loads" in report.stderr
    assert "serialized" not in report.stderr  # ptxas where it cannot leave a wgmma in flight


@needs_gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # inductor's advice to allow it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "positions", "m", "n"),
    [(1, 1, 1, 1), (3, 5, 7, 9), (8, 200, 768, 769), (600, 17, 64, 10), (2, 4096, 1024, 640)],
)
def test_kernel_on_a_gpu(dtype, batch, positions, m, n):
    left = torch.randn(batch, positions, m, device="cuda").to(dtype)
    right = torch.randn(positions, batch, n, device="cuda").to(dtype).transpose(0, 1)
    each = torch.einsum("bti,btj->bij", left.double(), right.double())
    terms = torch.einsum("bti,btj->ij", left.double().abs(), right.double().abs())

    def check(total, sq_norms):  # tensor cores add with truncation, T / 16 times
        assert bool(((total - each.sum(0)).abs() <= 1e-5 * terms).all())
        torch.testing.assert_close(sq_norms.double(), each.square().sum((1, 2)), rtol=1e-4, atol=0)

    first = kernels.outer_sum_and_sq_norms(left, right)
    check(*first)
    for one, other in zip(first, kernels.outer_sum_and_sq_norms(left, right), strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()
    compiled = torch.compile(kernels.outer_sum_and_sq_norms, fullgraph=True)
    check(*compiled(left, right))


@needs_gpu
def test_more_numbers_than_32_bits_count():
    batch, positions, m = 2, 128, 2**31 // 256 + 64
    left = torch.zeros(batch, positions, m, device="cuda", dtype=torch.bfloat16)  # 4 GiB
    left[:, -1, -1] = 1
    right = torch.ones(batch, positions, 16, device="cuda", dtype=torch.bfloat16)
    total, sq_norms = kernels.outer_sum_and_sq_norms(left, right)
    assert total.sum().item() == total[-1].sum().item() == batch * 16
    assert sq_norms.tolist() == [16, 16]
