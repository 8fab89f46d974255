"""A roofline of the CUDA kernels from their machine code; needs nvcc or a built library, no GPU.

The kernels spend their time in one loop, a trip of which makes a row of outputs or some. Its
instructions, counted in the disassembly, bound the speed three ways: the scheduler issues one a
clock, lane and warp, the special-function unit (exponentials, reciprocals) takes 16 a clock, and
memory is busy only while enough loads are in flight. Counts are static: code in the loop that only
runs at the edge of the image counts as well, and the rows that a ring reads above and below those
of its outputs do not. No GPU has been there to tell how far predictions are off.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mmsoftpool.errors import UserError

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "soft_pool.cu"
#: Threads of a block, as csrc/cuda/soft_pool.cu launches the kernels.
BLOCK_SIZE = 128
#: Per architecture: the threads, blocks and bytes of shared memory that an SM holds at most (CUDA
#: C++ Programming Guide, "Technical Specifications per Compute Capability").
LIMITS = {
    "7.5": (1024, 16, 64 << 10),
    "8.0": (2048, 32, 164 << 10),
    "8.6": (1536, 16, 100 << 10),
    "8.9": (1536, 24, 100 << 10),
    "9.0": (2048, 32, 228 << 10),
    "10.0": (2048, 32, 228 << 10),
    "12.0": (1536, 24, 100 << 10),
}
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
}
_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
# /*0120*/ @!P0 MUFU.EX2 R1, R2 ;
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE
)


class Gpu(NamedTuple):
    """What a prediction assumes of a GPU. The defaults are an H200's."""

    #: Name for the tables.
    name: str = "H200"
    #: Number of streaming multiprocessors (SMs).
    sms: int = 132
    #: Clock in Hz.
    clock: float = 1.9e9
    #: Instructions of threads that an SM issues in a clock: four schedulers, a warp each.
    lanes: int = 128
    #: Exponentials or reciprocals of threads that an SM takes in a clock.
    special: int = 16
    #: Bytes per second that a copy moves, reads and writes together.
    bandwidth: float = 4.2e12
    #: Clocks from a load to its data.
    latency: float = 800


H200 = Gpu()


class Instruction(NamedTuple):
    """An instruction of the disassembly."""

    address: int
    opcode: str  # with its modifiers, such as LDG.E.128.CONSTANT
    operands: str


class Function(NamedTuple):
    """A kernel of the disassembly; ``registers`` and ``shared`` (bytes) are its resources."""

    name: str  # mangled
    instructions: list[Instruction]
    registers: int
    shared: int


def find_program(name: str) -> str:
    """Finds a program of the CUDA toolkit: on PATH, in CUDA_HOME, or installed from PyPI.

    Args:
        name: such as ``'nvcc'`` or ``'cuobjdump'``; a path is taken as it is.

    Raises:
        FileNotFoundError: If it is in none of these places.
    """
    found = shutil.which(name)
    folders = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"), reverse=True)
    paths = [found] if found else [folder / name for folder in folders if (folder / name).exists()]
    if not paths:
        raise FileNotFoundError(
            f"no {name} on PATH, in CUDA_HOME or in site-packages (the disassembler is on PyPI: "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
        )
    return str(paths[0])


def compile_kernels(arch: str, cubin: Path) -> None:
    """Compiles csrc/cuda for one architecture.

    Args:
        arch: Compute capability, such as ``'9.0'``.
        cubin: File to write.

    Raises:
        UserError: If nvcc does not know ``arch``.
        FileNotFoundError: If there is no nvcc.
    """
    if not SOURCE.exists():
        raise FileNotFoundError(f"no {SOURCE} to compile the kernels from")
    number = arch.replace(".", "")
    command = [find_program("nvcc"), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}", str(SOURCE), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(f"arch {arch!r} does not compile: {result.stderr.strip()}")


def disassemble(binary: str | Path, arch: str) -> list[Function]:
    """Disassembles the kernels of a cubin or a shared library.

    Args:
        binary: The file.
        arch: Compute capability of the code to take, such as ``'9.0'``.

    Raises:
        UserError: If the file has no code for that architecture.
        FileNotFoundError: If the disassembler is missing.
    """
    program, helper = find_program("cuobjdump"), find_program("nvdisasm")
    path = os.pathsep.join([str(Path(helper).parent), os.environ.get("PATH", "")])
    command = [program, "-arch", "sm_" + arch.replace(".", ""), str(binary)]
    output = []
    for option in ("-res-usage", "-sass"):
        result = subprocess.run(
            [*command, option], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        if result.returncode != 0 or "Function" not in result.stdout:
            raise UserError(
                f"binary must have code for architecture {arch}, got {binary} "
                f"({result.stderr.strip() or 'no kernels'})"
            )
        output.append(result.stdout)
    return parse(*output)


def parse(resources: str, sass: str) -> list[Function]:
    """Parses what ``cuobjdump -res-usage`` and ``cuobjdump -sass`` print."""
    usage = {
        name: (int(registers), int(shared))
        for name, registers, shared in re.findall(
            r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", resources
        )
    }
    functions = []
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        name = part.split(maxsplit=1)[0]
        instructions = [
            Instruction(int(address, 16), opcode, operands.strip())
            for address, opcode, operands in _INSTRUCTION.findall(part)
        ]
        functions.append(Function(name, instructions, *usage[name]))
    return functions


def _loops(instructions: list[Instruction]) -> set[tuple[int, int]]:
    """The addresses of loops, from the target of a backward branch to the branch."""
    loops = set()
    for instruction in instructions:
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands)
        if instruction.opcode.startswith("BRA") and target:
            begin = int(target.group(1), 16)
            if begin < instruction.address:
                loops.add((begin, instruction.address))
    # Several branches back to one place are one loop.
    return {(begin, max(e for b, e in loops if b == begin)) for begin, _ in loops}


def hot_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The largest innermost loop, from the target of a backward branch to the branch; all if none.

    A loop is innermost if none of the others lies inside it. If several store, the kernel has a
    second way for rare numbers, and the loop with the fewest special functions a store is taken.
    """
    loops = _loops(instructions)
    innermost = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    if not innermost:
        return instructions
    codes = [[i for i in instructions if begin <= i.address <= end] for begin, end in innermost]
    storing = [code for code in codes if any(i.opcode.startswith("STG") for i in code)]
    if len(storing) > 1:
        return min(storing, key=lambda code: (_special(code) / _stored(code), len(code)))
    return max(codes, key=len)


def _special(instructions: list[Instruction]) -> int:
    """Special functions: exponentials and reciprocals."""
    return sum(i.opcode.startswith("MUFU") for i in instructions)


def _stored(instructions: list[Instruction]) -> float:
    """Bytes of global memory that are written."""
    return sum(_width(i) for i in instructions if i.opcode.startswith("STG")) / 8


def occupancy(arch: str, registers: int, shared: int, block_size: int = BLOCK_SIZE) -> float:
    """The share of an SM's threads that can be resident.

    Registers are handed out to warps in units of 256, of which an SM has 64 Ki.
    """
    threads, blocks, shared_size = LIMITS[arch]
    warps = -(-block_size // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = shared_size // (shared + 1024) if shared else blocks
    return min(threads // block_size, blocks, by_registers, by_shared) * block_size / threads


def _width(instruction: Instruction) -> int:
    """Bits that a load or store moves for a thread."""
    width = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", instruction.opcode)
    return int(width.group(1) or width.group(2)) if width else 32


def _describe(name: str) -> dict[str, object] | None:
    """What a kernel is, by its demangled name; None if that is not one of the operator's."""
    match = re.search(
        r"(forward|backward)_kernel<mmsoftpool::cuda::"
        r"Strip<(\w+), (\d), (\d), (\d), \d, (\d), (true|false)>",
        name,
    )
    if match:
        direction, dtype, kernel, stride, pad, channels, packed = match.groups()
        contiguous = "contiguous" if packed == "true" else "unaligned"
        return dict(
            direction=direction,
            dtype=_DTYPES[dtype],
            layout=contiguous if channels == "1" else "channels_last",
            kernel=f"k{kernel} s{stride} p{pad}",
            stride=int(stride),
        )
    match = re.search(
        r"(\w+)_kernel<mmsoftpool::cuda::Ring<(\w+), (\d+), \(mmsoftpool::cuda::Access\)(\d)>",
        name,
    )
    if match:
        step, dtype, kernel, access = match.groups()
        return dict(
            direction="backward" if step == "summarize" else step,
            dtype=_DTYPES[dtype],
            layout="contiguous" if access == "0" else "channels_last",
            kernel=f"k{kernel} s1 p{int(kernel) // 2}",
            stride=1,
            summarizes=step == "summarize",
        )
    match = re.search(r"(\w+)_kernel<mmsoftpool::cuda::General<(\w+), (int|long)>", name)
    if match is None:
        return None
    return dict(
        direction=match.group(1),
        dtype=_DTYPES[match.group(2)],
        layout="any layout",
        kernel="any window, 32 bits" if match.group(3) == "int" else "any window, 64 bits",
    )


def _demangle(names: Iterable[str]) -> list[str]:
    """Readable names of C++ functions, by the c++filt that comes with a compiler."""
    result = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    )
    return result.stdout.splitlines()


def _add(first: dict, second: dict) -> dict:
    """The row of two kernels that run after each other for the same outputs."""
    row = dict(first)
    for key in ("spills", "loop", "instructions", "special"):
        row[key] += second[key]
    for key in ("registers", "load_bits", "store_bits"):
        row[key] = max(row[key], second[key])
    for key in ("occupancy", "memory"):
        row[key] = min(row[key], second[key])
    for key in ("issue", "exponential"):
        row[key] = 1 / (1 / row[key] + 1 / second[key])
    return row


def analyse(functions: list[Function], arch: str, gpu: Gpu = H200) -> list[dict]:
    """Counts and predicts, a row per kernel.

    Args:
        functions: From :func:`disassemble`.
        arch: Compute capability that they are compiled for.
        gpu: The assumptions. Defaults to an H200.

    Returns:
        Per kernel ``direction``, ``dtype``, ``layout`` and ``kernel``; ``registers``; ``spills``,
        the number of instructions that move local memory; ``shared`` in bytes; ``occupancy``; and
        of the hot loop ``loop``, its instructions, and ``load_bits`` and ``store_bits``, the widest
        of each. Strips and rings have ``instructions`` and ``special`` per output as well (an
        output of the pooling, in the backward too), and ``issue``, ``exponential`` and ``memory``:
        the shares of the copy bandwidth that each would allow if every tensor is moved once.
        ``memory`` supposes that all resident threads have the loads of one trip in flight, and is 1
        at most. The two kernels of a ring's backward are one row. A ring for any layout counts as
        channels last, inside the plane. The general kernels' loops are over taps, so they have no
        numbers per output.
    """
    rows = {}
    names = _demangle(function.name for function in functions)
    for name, function in zip(names, functions, strict=True):
        case = _describe(name)
        if case is None:
            continue
        stride, summarizes = case.pop("stride", None), case.pop("summarizes", False)
        loop = hot_loop(function.instructions)
        loads = [_width(i) for i in loop if i.opcode.startswith("LDG")]
        stores = [_width(i) for i in loop if i.opcode.startswith("STG")]
        row = dict(
            case,
            arch=arch,
            registers=function.registers,
            spills=sum(i.opcode.startswith(("LDL", "STL")) for i in function.instructions),
            shared=function.shared,
            occupancy=occupancy(arch, function.registers, function.shared),
            loop=len(loop),
            load_bits=max(loads, default=0),
            store_bits=max(stores, default=0),
        )
        if stride:
            # The backward stores the gradients of as many inputs.
            outputs = _stored(loop) / (8 if summarizes else _BYTES[case["dtype"]])
            outputs /= stride**2 if case["direction"] == "backward" else 1
            special = _special(loop) / outputs
            instructions = len(loop) / outputs
            # Elements per output: x is read, y written; or x and g read, dx written.
            elements = {"forward": stride**2 + 1, "backward": 2 * stride**2 + 1}
            moved = elements[case["direction"]] * _BYTES[case["dtype"]]
            in_flight = row["occupancy"] * LIMITS[arch][0] * sum(loads) / 8 * gpu.sms
            rate = gpu.sms * gpu.clock * moved / gpu.bandwidth
            row.update(
                outputs=outputs,
                instructions=instructions,
                special=special,
                issue=rate * gpu.lanes / instructions,
                exponential=rate * gpu.special / special,
                memory=min(1.0, in_flight / (gpu.latency / gpu.clock * gpu.bandwidth)),
            )
        key = tuple(case.items())
        rows[key] = _add(rows[key], row) if key in rows else row
    rows = list(rows.values())
    order = ("direction", "layout", "dtype", "kernel")
    return sorted(rows, key=lambda row: ("issue" not in row, *(row[key] for key in order)))


def roofline(arch: str, gpu: Gpu = H200, library: str | Path | None = None) -> list[dict]:
    """Compiles and analyses the kernels for one architecture.

    Args:
        arch: Compute capability, such as ``'9.0'``.
        gpu: The assumptions. Defaults to an H200.
        library: A built library to take instead of compiling. Defaults to None.

    Raises:
        UserError: If ``arch`` is not a key of :data:`LIMITS`, or nvcc does not know it.
    """
    if arch not in LIMITS:
        raise UserError(f"arch must be one of {', '.join(LIMITS)}, got {arch!r}")
    if library is not None:
        if not Path(library).exists():
            raise FileNotFoundError(f"no library at {library}")
        return analyse(disassemble(library, arch), arch, gpu)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "soft_pool.cubin"
        compile_kernels(arch, cubin)
        return analyse(disassemble(cubin, arch), arch, gpu)


def table(rows: list[dict]) -> str:
    """Rows of :func:`roofline` as a Markdown table; / out is per output of the pooling."""
    lines = [
        "| kernel | registers | spills | shared | occupancy | loop | / out | exp / out "
        "| load, store bits | issue | exp | memory |",
        "|---|" + 11 * "---:|",
    ]
    for row in rows:
        cells = [
            "{direction} {dtype} {layout} {kernel}".format(**row),
            *(str(row[key]) for key in ("registers", "spills", "shared")),
            f"{row['occupancy']:.0%}",
            str(row["loop"]),
            *(f"{row[k]:.0f}" if k in row else "" for k in ("instructions", "special")),
            f"{row['load_bits']}, {row['store_bits']}",
            *(f"{row[k]:.0%}" if k in row else "" for k in ("issue", "exponential", "memory")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
