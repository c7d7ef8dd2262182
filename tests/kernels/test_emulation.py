"""The emulation of CUDA C++ on a CPU: right for a right kernel, and mistakes show."""

from __future__ import annotations

from ctypes import c_int, c_void_p
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.emulation.emulate import ORDERS, EmulationError
from wan_vae.kernels.cuda.program import Program, launch

CPU = torch.device("cpu")

# 16 x 16 by 16 x 8 products of one warp, operands by way of shared memory. MISTAKE: see the tests.
PRODUCT = """
SHARED_MEMORY(memory);
#if MISTAKE == 1
#define WAIT cp_wait<1>()
#else
#define WAIT cp_wait<0>()
#endif
template <Type TYPE, class D>
INLINE void multiply(D& d, const u32 (&a)[4], const u32 (&b)[4]) {
#if HALF_SUMS
  mma_half_sums(d, a, b[0], b[1]);
#else
  mma<TYPE>(d, a, b[0], b[1]);
#endif
}
extern "C" __global__ void __launch_bounds__(32) product(
    const u16* RESTRICT a, const u16* RESTRICT b, float* RESTRICT out, int rows) {
  const int lane = threadIdx.x;
  const u32 base = shared_address(memory);
  // Rows of a (16 channels, 32 bytes), then those of b, one column each.
  cp_async(base + lane * 16, a + lane * 8, lane / 2 < rows);
  cp_commit();
#if MISTAKE == 2
  cp_async(base + 512 + lane % 16 * 16, b + lane % 16 * 8);
  __syncwarp();
#else
  cp_async(lane < 16, base + 512 + lane * 16, b + lane * 8, true);
#endif
  cp_commit();
  WAIT;
  __syncwarp();
  u32 fa[4], fb[4];
  ldmatrix(fa, base + lane % 16 * 32 + lane / 16 * 16);
#if TRANSPOSED
  // b as 16 rows of 8 columns.
  ldmatrix_transposed(fb, base + 512 + lane % 16 * 16);
#else
  ldmatrix(fb, base + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
#endif
#if HALF_SUMS
  u32 h[2] = {0, 0};
  float d[4];
  multiply<Type::half>(h, fa, fb);
  for (int i = 0; i < 2; ++i) unpack<Type::half>(h[i], d[2 * i], d[2 * i + 1]);
#else
  float d[4] = {0, 0, 0, 0};
  multiply<BF16 ? Type::bf16 : Type::half>(d, fa, fb);
#endif
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
"""

# Each thread reverses its program's numbers by way of shared memory, twice, and adds over a warp.
EXCHANGE = """
SHARED_MEMORY(memory);
extern "C" __global__ void __launch_bounds__(128) exchange(const u32* x, u32* out, float* sums) {
  u32* shared = reinterpret_cast<u32*>(memory);
  const int i = threadIdx.x, mine = blockIdx.x * 128 + i;
  u32 v[4], word;
  load_global(word, x + mine);
  shared[i] = word;
#if MISTAKE != 1
  __syncthreads();
#endif
  word = shared[127 - i];
#if MISTAKE != 2
  __syncthreads();
#endif
  shared[i] = word + 1;
#if MISTAKE == 3
  if (i < 96)
#endif
  __syncthreads();
  store_global(out + mine, shared[127 - i]);
  float sum = i;
  for (int m = 1; m < 32; m *= 2) sum += shuffle_xor(sum, m);
  sums[mine] = sum;
#if MISTAKE == 4
  load_shared(v, shared_address(memory) + 512 - 16 + i / 127 * 16);
#elif MISTAKE == 5
  load_global(v, x + i);
#elif MISTAKE == 6
  load_global(v, x + 256 - 4 + i / 127 * 4);
#elif MISTAKE == 7
  load_global(word, out + mine);
#elif MISTAKE == 8
  shared[128] = 0;
#endif
}
"""


@dataclass(frozen=True)
class Written(Program):
    """A program whose source is here."""

    text: str = ""

    @property
    def source(self) -> str:
        """As of the product's programs, without machine.cuh."""
        return f'{self.header}\n#line 1 "{self.file}"\n{self.text}'


def written(
    text: str,
    entry: str,
    threads: int,
    shared_bytes: int,
    machine_code: str = "sm_80",
    **defines: int,
) -> Program:
    macros = tuple({"MISTAKE": 0, **defines}.items())
    file = f"{entry}.cu"
    return Written(file, entry, macros, machine_code, threads, shared_bytes, text=text)


def product(dtype: torch.dtype, rows: int = 16, machine_code: str = "sm_80", **defines: int):
    """What the kernel says, and a @ b."""
    macros = {"TRANSPOSED": 0, "HALF_SUMS": 0, "BF16": int(dtype == torch.bfloat16), **defines}
    program = written(PRODUCT, "product", 32, 768, machine_code, **macros)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=generator).to(dtype) for n in (16, 8))
    columns = b if macros["TRANSPOSED"] else b.t().contiguous()
    out = torch.full((16, 8), torch.nan)
    pointers = [c_void_p(x.data_ptr()) for x in (a, columns, out)]
    launch(program, CPU, (1, 1, 1), [*pointers, c_int(rows)])
    a[rows:] = 0
    return out, a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bf16"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_products_by_way_of_shared_memory(emulated, dtype, transposed):
    out, expected = product(dtype, rows=11, TRANSPOSED=transposed)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert emulated.conflicts > 0  # rows of 32 bytes


def test_turing_waits_for_no_copies(emulated):
    """Its threads copy themselves: the mistake is none there."""
    out, expected = product(torch.float16, machine_code="sm_75", MISTAKE=1)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_products_with_float16_sums(emulated):
    out, expected = product(torch.float16, HALF_SUMS=1)
    assert torch.equal(out, expected.float().half().float())


def test_a_copy_that_is_not_waited_for_is_poison(emulated):
    assert product(torch.float16, MISTAKE=1)[0].isnan().any()


def test_two_copies_to_one_place_at_once_are_a_race(emulated):
    with pytest.raises(EmulationError, match="two copies at once to byte 512 of shared memory"):
        product(torch.float16, MISTAKE=2)


def exchange(mistake: int = 0):
    program = written(EXCHANGE, "exchange", 128, 512, MISTAKE=mistake)
    x, out = torch.randint(0, 1000, (256,)).int(), torch.full((256,), -1).int()
    sums = torch.full((256,), torch.nan)
    launch(program, CPU, (2, 1, 1), [c_void_p(t.data_ptr()) for t in (x, out, sums)])
    return x, out, sums


def test_barriers_and_shuffles(emulated):
    torch.manual_seed(0)
    x, out, sums = emulated.in_every_order(lambda: (torch.manual_seed(0), *exchange())[1:])
    assert torch.equal(out, x + 1)
    expected = torch.arange(128.0).view(4, 32).sum(1).repeat_interleave(32).repeat(2)
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mistake", [1, 2], ids=["read too early", "written too early"])
def test_a_missing_barrier_shows(emulated, order, mistake):
    emulated.order = order
    x, out, _ = exchange(mistake)
    assert not torch.equal(out, x + 1)


FAULTS = {
    "waits for ever at __syncthreads": 3,
    "byte 512 of 512 of shared memory": 4,
    "no multiple of 16": 5,
    "byte 1024 of a tensor of 1024": 6,
    "reads a tensor that the same kernel writes": 7,
    r"wrote byte 512 of 512 of shared memory": 8,
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_ends_the_launch_and_says_what_it_was(emulated, message):
    with pytest.raises(EmulationError, match=message):
        exchange(FAULTS[message])
    x, out, _ = exchange()
    assert torch.equal(out, x + 1)


def test_arguments_must_be_those_of_the_kernel(emulated):
    program = written(EXCHANGE, "exchange", 128, 512)
    with pytest.raises(EmulationError, match="arguments"):
        launch(program, CPU, (1, 1, 1), [c_int(0), c_int(0), c_int(0)])
