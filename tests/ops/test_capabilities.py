"""The CPU kernels on every instruction set of the machine (ATEN_CPU_CAPABILITY); memory, speed."""

import re
import shutil
import subprocess
import timeit
from functools import partial
from pathlib import Path

import pytest
import torch

from mmsoftpool import soft_pool1d, soft_pool2d
from mmsoftpool.ops import backends

from ..common import ROOT, randn

CAPABILITIES = ["default", "avx2", "avx512"]
# Runs some of the tests of values, gradients and special numbers in a process of its own.
RUN = """
import sys, pytest
from mmsoftpool.ops import backends
print("capability:", backends.cpu_capability())
sys.exit(pytest.main(sys.argv[1:]))
"""
# Those of them that take little time.
SUBSET = (
    "TestValue or TestAlpha or TestNotFinite or up_to_15 or stay_in or wide_range or no_weight or "
    "accuracy or one_value or beyond or larger_than or overlap"
)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_variable_of_torch_chooses_and_the_results_are_right(run_script, capability):
    if capability == backends.cpu_capability():
        pytest.skip("all other tests run on it")
    # Of this process; the variable may hold it to less than the machine has.
    widest = backends.cpu_capability() or "default"
    if CAPABILITIES.index(capability) > CAPABILITIES.index(widest):
        pytest.skip(f"{capability} is not available here, the widest is {widest}")
    result = run_script(
        *("-c", RUN, "-q", "-p", "no:cacheprovider"),
        *("tests/ops/test_functional.py", "tests/ops/test_windows.py"),
        *("-k", f"({SUBSET}) and not reference"),
        check=False,
        ATEN_CPU_CAPABILITY=capability,
    )
    assert result.returncode == 0, result.stdout
    assert f"capability: {capability}\n" in result.stdout and " passed" in result.stdout


def test_an_unknown_instruction_set_counts_for_nothing(run_script):
    code = "from mmsoftpool.ops import backends; print(backends.cpu_capability())"
    result = run_script("-c", code, ATEN_CPU_CAPABILITY="mmx")
    assert CAPABILITIES.index(result.stdout.strip()) >= CAPABILITIES.index(
        backends.cpu_capability()
    )


MISSING = [name for name in ("c++", "qemu-x86_64") if shutil.which(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}")
def test_the_kernels_for_avx2_are_not_chosen_without_f16c(tmp_path):
    # Some emulators have machines with the one and not the other. The kernels are not linked.
    source = tmp_path / "main.cpp"
    source.write_text("""
#include "soft_pool.h"
int main() { return static_cast<int>(mmsoftpool::cpu::capability()); }
""")
    folder = ROOT / "csrc" / "cpu"
    command = ["c++", "-std=c++17", "-Wno-psabi", f"-I{folder}", source, folder / "soft_pool.cpp"]
    link = ["-static", "-Wl,--unresolved-symbols=ignore-all", "-o", tmp_path / "main"]
    subprocess.run([*command, *link], check=True)

    def capability(machine):
        return subprocess.run(["qemu-x86_64", "-cpu", machine, tmp_path / "main"]).returncode

    assert CAPABILITIES[capability("max")] == "avx2"  # qemu emulates no more
    assert CAPABILITIES[capability("max,-f16c")] == "default"


def test_the_reference_has_no_instruction_set(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda device: backends.Backend(None, None, "forced"))
    assert backends.cpu_capability() is None


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_float16_keeps_subnormal_numbers_where_float32_flushes_them(format):
    # All of them, with both signs, as F.max_pool2d does.
    x = torch.arange(1024, dtype=torch.int16).view(torch.float16).reshape(1, 64, 4, 4)
    x = torch.cat([x, -x], 2).contiguous(memory_format=format)
    torch.set_flush_denormal(True)
    try:
        y = soft_pool2d(x, 1)
    finally:
        torch.set_flush_denormal(False)
    assert y.equal(x)


def test_memory_does_not_grow_with_the_stride():
    x = randn(1, 1, 8).requires_grad_()
    y = soft_pool1d(x, 2, 10**9)
    assert y.equal(soft_pool1d(x[..., :2], 2))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[..., :2].sum().item() == pytest.approx(1, abs=1e-6)
    assert (grad[..., 2:] == 0).all()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_mask_of_a_rows_vector_counts_more_than_32_bits(tmp_path):
    # A row of that many outputs would take 40 GB.
    source = tmp_path / "mask.cpp"
    source.write_text("""
#include "simd.h"
using S = mmsoftpool::cpu::Simd<float, 16>;
int main() {
  volatile int64_t many = (int64_t(1) << 32) + 1, few = 3;
  const S::Bits all = S::first_lanes(many), three = S::first_lanes(few);
  return int32_t(all[3]) < 0 && int32_t(three[2]) < 0 && int32_t(three[3]) >= 0 ? 0 : 1;
}
""")
    program = tmp_path / "mask"
    command = ["c++", "-std=c++17", "-Wno-psabi", f"-I{ROOT / 'csrc' / 'cpu'}", source]
    subprocess.run([*command, "-o", program], check=True)
    subprocess.run([program], check=True)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_large_tensor_is_pooled_as_its_parts(format):
    x = randn(1, 9, 1000, 1000).contiguous(memory_format=format).requires_grad_()
    y = soft_pool2d(x, 2, 1)
    (grad,) = torch.autograd.grad(y.sum(), x)
    part = x.detach()[:, :, 500:].contiguous(memory_format=format).requires_grad_()
    part_y = soft_pool2d(part, 2, 1)
    (part_grad,) = torch.autograd.grad(part_y.sum(), part)
    assert y[:, :, 500:].equal(part_y)
    assert grad[:, :, 501:].equal(part_grad[:, :, 1:])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_neighbouring_windows_share_exponentials(format):
    # Where values are too far apart every window has its own, which takes 7 to 11 times as long. A
    # kernel that shares none is right all the same.
    near = randn(1, 32, 48, 48).contiguous(memory_format=format).requires_grad_()
    far = (1000 * near).detach().requires_grad_()
    times = []
    for x in (near, far):
        y = soft_pool2d(x, 9, 1, 4)
        forward = partial(soft_pool2d, x.detach(), 9, 1, 4)
        backward = partial(torch.autograd.grad, y, x, y.detach(), retain_graph=True)
        times.append([min(timeit.repeat(f, number=1, repeat=9)) for f in (forward, backward)])
    assert all(far > 2 * near for near, far in zip(*times, strict=True))


# The peak of the process, whose memory the tensors themselves are part of.
MEMORY = """
import sys, torch
from pathlib import Path
from mmsoftpool import soft_pool2d, soft_pool3d
torch.set_num_threads(1)
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
{setup}
before = peak()
{backward}
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of memory")
@pytest.mark.parametrize("format", ["contiguous_format", "channels_last_3d"])
def test_a_backward_in_3d_takes_memory_for_the_slices_of_a_window(run_script, format):
    def megabytes(pool):
        setup = (
            f"x = torch.zeros(1, 64, 32, 64, 64).contiguous(memory_format=torch.{format})\n"
            f"y = {pool}(x.requires_grad_(), 3, 1, 1); g = torch.ones_like(y)"
        )
        code = MEMORY.format(setup=setup, backward="torch.autograd.grad(y, x, g)")
        return int(run_script("-c", code).stdout)

    # A process may count up to a tensor more, 32 MiB, for torch's own pools too. With all slices
    # there were 224 more, channels last.
    assert megabytes("soft_pool3d") < megabytes("torch.nn.functional.avg_pool3d") + 32


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of memory")
@pytest.mark.parametrize("format", ["contiguous_format", "channels_last"])
def test_a_kernel_larger_than_the_map_takes_memory_for_the_map_alone(run_script, format):
    setup = f"x = torch.zeros(1, 4, 32, 32).contiguous(memory_format=torch.{format})"
    backward = "soft_pool2d(x.requires_grad_(), 2047, 1, 1023).sum().backward()"
    code = MEMORY.format(setup=setup, backward=backward)
    assert int(run_script("-c", code).stdout) < 32  # 127 with all taps


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages"
)
def test_large_outputs_and_gradients_ask_for_huge_pages():
    x = torch.zeros(1, 9, 1000, 1000, requires_grad=True)
    y = soft_pool2d(x, 1)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert "hg" in flags_of_memory(y) and "hg" in flags_of_memory(grad)


@pytest.mark.parametrize(("size", "variable"), [(300, "1"), (1000, "0")])
def test_small_outputs_do_not_and_the_variable_turns_it_off(run_script, size, variable):
    # In a process of its own: malloc may give out memory again for which the system was asked.
    code = (
        "import torch; from mmsoftpool import soft_pool2d\n"
        "from tests.ops.test_capabilities import flags_of_memory\n"
        f"print(flags_of_memory(soft_pool2d(torch.zeros(1, 9, {size}, {size}), 1)))"
    )
    flags = run_script("-c", code, MMSOFTPOOL_HUGE_PAGES=variable).stdout
    assert "'rd'" in flags and "'hg'" not in flags


def flags_of_memory(tensor):
    """What the system knows about the memory in the middle of a tensor."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no memory at {address:#x}")
