"""A roofline of the CUDA kernels from their machine code; needs nvcc or a built library, no GPU.

The strip kernels spend their time in one loop, a trip of which makes a row of outputs or two. Its
instructions, counted in the disassembly, bound the speed three ways: the scheduler issues one a
clock, lane and warp, the special-function unit (exponentials, reciprocals) takes 16 a clock, and
memory is busy only while enough loads are in flight. Counts are static: code in the loop that only
runs at the edge of the image counts as well, so the truth is somewhat better. Predictions are good
to about 20 %.

A tile kernel, for large windows, has a loop in each of its phases, which barriers separate. Their
instructions count as often as the loops run for the maps of :data:`TILE_CASES`.
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
#: Kernel size, and height and width of the map, of the tile kernels' counts: YOLO's SPP. The
#: padding is half the kernel.
TILE_CASES = ((5, 40), (9, 20), (13, 20))
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
    #: Bytes that the shared memory of an SM moves in a clock.
    shared: int = 128
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
        UserError: If ``arch`` is not a key of :data:`LIMITS`, or nvcc does not know it.
        FileNotFoundError: If there is no nvcc.
    """
    if arch not in LIMITS:
        raise UserError(f"arch must be one of {', '.join(LIMITS)}, got {arch!r}")
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
        return min(storing, key=lambda code: _count(code).special / _stored(code))
    return max(codes, key=len)


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
    width = re.search(r"\.(?:[US](8|16)|(64|128))\b", instruction.opcode)
    return int(width.group(1) or width.group(2)) if width else 32


def _describe(name: str) -> dict[str, object] | None:
    """What a kernel is, by its demangled name; None if that is not one of the operator's."""
    match = re.search(
        r"(forward|backward)_strip_kernel<mmsoftpool::cuda::"
        r"(?:Sum)?Strip<(\w+), (\d), (\d), (\d), \d, (\d), (true|false)>",
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
    match = re.search(r"(\w+)_tile_kernel<(\w+)>", name)
    if match:
        return dict(direction=match.group(1), dtype=_DTYPES[match.group(2)], tiles=True)
    match = re.search(r"(\w+)_kernel<(\w+), (int|long)>", name)
    if match is None or match.group(2) not in _DTYPES:
        return None
    return dict(
        direction=match.group(1),
        dtype=_DTYPES[match.group(2)],
        layout="any layout",
        kernel="any window, 32 bits" if match.group(3) == "int" else "any window, 64 bits",
    )


class TilePlan(NamedTuple):
    """How csrc/cuda/tile.h divides a map; pairs are (height, width)."""

    #: Neighbouring channels of a tile, threads of a block, and bytes of its shared memory.
    lanes: int
    threads: int
    shared: int
    #: Tiles of a plane.
    tiles: tuple[int, int]
    #: Of a tile: inputs, windows, and the outputs or gradients that it writes.
    inputs: tuple[int, int]
    windows: tuple[int, int]
    written: tuple[int, int]


def tile_plan(
    direction: str, channels_last: bool, dtype: str, kernel_size: int, size: int
) -> TilePlan | None:
    """The tiles of a square map and a window of stride 1, padded by half; None if there are none.

    The same rule as ``with_tile`` in csrc/cuda/tile.h, against which a test holds it.

    Args:
        direction: ``'forward'`` or ``'backward'``.
        channels_last: The memory format, of more than one channel.
        dtype: Such as ``'float32'``.
        kernel_size: Of both axes.
        size: Height and width of the input.
    """
    number = 2 * max(4, _BYTES[dtype])
    out = size + 2 * (kernel_size // 2) - kernel_size + 1
    backward = direction == "backward"
    for lanes in (8, 4, 2, 1) if channels_last else (1,):
        counts = [-(-(size if backward else out) // 128)] * 2
        while True:
            axes = []
            for count in counts:
                whole = size if backward else out
                written = -(-whole // count)
                windows = min(out, written + (kernel_size - 1) * backward)
                inputs = min(size, windows + kernel_size - 1)
                axes.append((-(-whole // written), inputs, windows, written))
            tiles, inputs, windows, written = zip(*axes, strict=True)
            items = inputs[0] * -(-windows[1] // 4) * lanes
            rounds = max(4, -(-items // 256))
            threads = -(-items // (32 * rounds)) * 32
            pitch = (max(inputs[1], windows[1]) | 1) * lanes
            sum_pitch = (-(-max(windows[1], written[1]) // 4) * 4 | 1) * lanes
            shared = (lanes + max(inputs[0], windows[0]) * (pitch + sum_pitch)) * number
            if shared <= 63 << 10:
                overhead = inputs[0] * inputs[1] / (written[0] * written[1])
                if overhead > (2 if lanes > 1 else 4):
                    break
                return TilePlan(lanes, threads, shared, tiles, inputs, windows, written)
            if written == (1, 1):
                break
            counts[0 if written[0] > written[1] else 1] += 1
    return None


class _Counts(NamedTuple):
    """What the threads of a block do: instructions, special functions, bytes of shared memory."""

    instructions: float = 0
    special: float = 0
    shared: float = 0

    def __add__(self, other):
        return _Counts(*(x + y for x, y in zip(self, other, strict=True)))

    def __mul__(self, times):
        return _Counts(*(x * times for x in self))


def _count(instructions: list[Instruction]) -> _Counts:
    return _Counts(
        len(instructions),
        sum(i.opcode.startswith("MUFU") for i in instructions),
        sum(_width(i) / 8 for i in instructions if i.opcode.startswith(("LDS", "STS"))),
    )


def tile_phases(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The phases of a tile kernel, those of windows that need the general way left out.

    Barriers end them. In the backward the general phases stand before or after the last two, and
    are longer.
    """
    phases = [[]]
    for instruction in instructions:
        phases[-1].append(instruction)
        if instruction.opcode.startswith("BAR"):
            phases.append([])
    decision = next(i for i, p in enumerate(phases) if p[-1].opcode.startswith("BAR.RED"))
    others = phases[decision + 1 : decision + 5]
    if len(others) < 4:
        return phases[: decision + 1]
    return phases[: decision + 1] + min(
        others[:2], others[2:], key=lambda pair: sum(map(len, pair))
    )


def _count_phase(phase: list[Instruction]) -> tuple[_Counts, _Counts, _Counts, int]:
    """A phase outside its loop, in the loop but not in the one inside, in that, and its loads."""
    loops = _loops(phase)
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = max(
        (loop for loop in loops if begin <= loop[0] and loop[1] <= end and loop != (begin, end)),
        key=lambda loop: loop[1] - loop[0],
    )
    inside = [i for i in phase if inner[0] <= i.address <= inner[1]]
    between = [i for i in phase if begin <= i.address <= end and i not in inside]
    outside = [i for i in phase if not begin <= i.address <= end]
    loads = sum(i.opcode.startswith("LDG") for i in inside)
    return _count(outside), _count(between), _count(inside), loads


def _tile_row(function, case, arch, gpu, layout, kernel_size, size) -> dict:
    """The counts and the prediction of a tile kernel for one map."""
    last = layout == "channels_last"
    plan = tile_plan(case["direction"], last, case["dtype"], kernel_size, size)
    total, loop, in_flight = _Counts(), 0, 0
    phases = tile_phases(function.instructions)
    for number, phase in enumerate(phases):
        outside, between, inside, loads = _count_phase(phase)
        loop += between.instructions + inside.instructions
        total += outside * plan.threads
        if number < 2:
            # Over the inputs: a thread has some rows of a column, `loads` of them at once.
            threads = plan.threads // plan.lanes
            columns = min(threads, plan.inputs[1])
            rows = threads // columns
            trips = -(-plan.inputs[0] // (rows * max(loads, 1)))
            trips *= -(-plan.inputs[1] // columns)
            total += (between + inside * trips) * plan.threads
            in_flight = max(in_flight, loads)
            continue
        # Over groups of four sums, an inner trip for each number that they share: along the columns
        # of inputs or windows, then the rows.
        shape = {
            2: (plan.inputs[0], plan.windows[1]),
            3: (plan.windows[1], plan.windows[0]),
            4: (plan.windows[0], plan.written[1]),
            5: (plan.written[1], plan.written[0]),
        }[number]
        items = -(-shape[0] * -(-shape[1] // 4) * plan.lanes // 32) * 32
        total += (between + inside * (kernel_size - 3)) * items
    outputs = plan.written[0] * plan.written[1] * plan.lanes
    total = total * (1 / outputs)
    shared = function.shared + plan.shared
    elements = {"forward": 2, "backward": 3}[case["direction"]]
    element = _BYTES[case["dtype"]]
    rate = gpu.sms * gpu.clock * elements * element / gpu.bandwidth
    share = occupancy(arch, function.registers, shared, plan.threads)
    loaded = share * LIMITS[arch][0] * in_flight * element * gpu.sms
    return dict(
        case,
        layout=layout,
        kernel=f"k{kernel_size} s1 p{kernel_size // 2} {size}x{size}",
        arch=arch,
        registers=function.registers,
        spills=sum(i.opcode.startswith(("LDL", "STL")) for phase in phases for i in phase),
        shared=shared,
        occupancy=share,
        loop=loop,
        load_bits=8 * element,
        store_bits=8 * element,
        outputs=outputs,
        instructions=total.instructions,
        special=total.special,
        issue=rate * gpu.lanes / total.instructions,
        exponential=rate * gpu.special / total.special,
        banks=rate * gpu.shared / total.shared,
        memory=min(1.0, loaded / (gpu.latency / gpu.clock * gpu.bandwidth)),
    )


def _demangle(names: Iterable[str]) -> list[str]:
    """Readable names of C++ functions, by the c++filt that comes with a compiler."""
    result = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    )
    return result.stdout.splitlines()


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
        of each. The strip kernels have ``instructions`` and ``special`` per output as well (an
        output of the pooling, in the backward too), and ``issue``, ``exponential`` and ``memory``:
        the shares of the copy bandwidth that each would allow if every tensor is moved once.
        ``memory`` supposes that all resident threads have the loads of one trip in flight, and is 1
        at most. The tile kernels have these for each of :data:`TILE_CASES` and layout, without the
        phases of windows that need the general way, and ``banks``, the share that shared memory
        allows. The general kernels' loops are over taps, so they have no numbers per output.
    """
    rows = []
    names = _demangle(function.name for function in functions)
    for name, function in zip(names, functions, strict=True):
        case = _describe(name)
        if case is None:
            continue
        if case.pop("tiles", False):
            rows += [
                _tile_row(function, case, arch, gpu, layout, *map_case)
                for layout in ("contiguous", "channels_last")
                for map_case in TILE_CASES
            ]
            continue
        stride = case.pop("stride", None)
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
            outputs = _stored(loop) / _BYTES[case["dtype"]]
            outputs /= stride**2 if case["direction"] == "backward" else 1
            special = sum(i.opcode.startswith("MUFU") for i in loop) / outputs
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
        rows.append(row)
    order = ("direction", "layout", "dtype", "kernel")
    return sorted(rows, key=lambda row: ("issue" not in row, *(row[key] for key in order)))


def roofline(arch: str, gpu: Gpu = H200, library: str | Path | None = None) -> list[dict]:
    """Compiles and analyses the kernels for one architecture.

    Args:
        arch: Compute capability, such as ``'9.0'``.
        gpu: The assumptions. Defaults to an H200.
        library: A built library to take instead of compiling. Defaults to None.
    """
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
        "| load, store bits | issue | exp | banks | memory |",
        "|---|" + 12 * "---:|",
    ]
    for row in rows:
        cells = [
            "{direction} {dtype} {layout} {kernel}".format(**row),
            *(str(row[key]) for key in ("registers", "spills", "shared")),
            f"{row['occupancy']:.0%}",
            str(row["loop"]),
            *(f"{row[k]:.0f}" if k in row else "" for k in ("instructions", "special")),
            f"{row['load_bits']}, {row['store_bits']}",
            *(
                f"{row[k]:.0%}" if k in row else ""
                for k in ("issue", "exponential", "banks", "memory")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
