"""The counts of machine code, on a made-up listing, and the budget of the real kernels."""

import json

import pytest

import roofline

from ..common import ROOT

# Two nested loops, the inner one with a second branch back; what follows is out of the loops.
SASS = """
\tcode for sm_90
\t\tFunction : _Z6kernelv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/                   S2R R3, SR_CTAID.X ;        /* 0x0000000000037919 */
        /*0020*/               @P0 LDG.E.128 R4, [R2.64] ;     /* 0x0 */
        /*0030*/              @!P6 LDG.E.U16.CONSTANT R4, [R2.64] ;  /* 0x0 */
        /*0040*/                   MUFU.EX2 R1, R2 ;           /* 0x0 */
        /*0050*/              @!P1 BRA 0x20 ;                  /* 0x0 */
        /*0060*/               @P1 BRA 0x20 ;                  /* 0x0 */
        /*0070*/                   STL.64 [R1], R2 ;           /* 0x0 */
        /*0080*/              @!P2 BRA 0x10 ;                  /* 0x0 */
        /*0090*/                   EXIT ;                      /* 0x0 */
        /*00a0*/                   BRA 0xa0 ;                  /* 0x0 */
"""
USAGE = """
Resource usage:
 Function _Z6kernelv:
  REG:40 STACK:0 SHARED:256 LOCAL:0 CONSTANT[0]:644 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_a_listing_is_parsed_with_its_resources():
    (function,) = roofline.parse(USAGE, SASS)
    assert (function.name, function.registers, function.shared) == ("_Z6kernelv", 40, 256)
    assert [i.address for i in function.instructions] == list(range(0, 0xB0, 0x10))
    assert function.instructions[2] == (0x20, "LDG.E.128", "R4, [R2.64]")


def test_the_hot_loop_is_the_innermost_up_to_its_last_branch():
    (function,) = roofline.parse(USAGE, SASS)
    loop = roofline.hot_loop(function.instructions)
    assert [i.address for i in loop] == [0x20, 0x30, 0x40, 0x50, 0x60]


def test_code_without_a_loop_counts_as_a_whole():
    (function,) = roofline.parse(USAGE, SASS)
    assert roofline.hot_loop(function.instructions[:2]) == function.instructions[:2]


def test_of_two_loops_that_store_the_hot_one_has_fewer_special_functions_a_store():
    names = ["MUFU", "STG", "BRA", "LDG", "FADD", "MUFU", "MUFU", "STG", "BRA"]
    targets = {2: "0x0", 8: "0x30"}
    code = [roofline.Instruction(16 * i, n, targets.get(i, "")) for i, n in enumerate(names)]
    assert roofline.hot_loop(code) == code[:3]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "expected"),
    [
        ("9.0", 32, 0, 1.0),  # 16 blocks of 128 threads
        ("9.0", 33, 0, 12 / 16),  # rounded up to 40 registers: 12 blocks
        ("9.0", 128, 0, 4 / 16),
        ("12.0", 32, 0, 1.0),  # 1536 threads a SM
        ("8.0", 32, 40 << 10, 4 / 16),  # 164 KiB hold four times 40 + 1
    ],
)
def test_occupancy(arch, registers, shared, expected):
    assert roofline.occupancy(arch, registers, shared) == expected


def listing(*opcodes):
    """A strip kernel whose loop is these instructions and a branch."""
    name = "_Z14forward_kernelIN10mmsoftpool4cuda5StripIfLi3ELi2ELi1ELi2ELi1ELb1EEEEvv"
    code = [*opcodes, "BRA"]
    instructions = [
        roofline.Instruction(16 * i, opcode, "0x0" if opcode == "BRA" else "")
        for i, opcode in enumerate(code)
    ]
    return roofline.Function(name, instructions, 32, 0)


def test_shares_of_the_copy_bandwidth():
    gpu = roofline.Gpu(sms=100, clock=1e9, lanes=128, special=16, bandwidth=1e12, latency=1000)
    function = listing("LDG.E.128", *["FADD"] * 17, "MUFU.EX2", "MUFU.RCP", "STG.E.64")
    (row,) = roofline.analyse([function], "9.0", gpu)
    assert row["outputs"] == 2 and row["instructions"] == 11 and row["special"] == 1
    assert row["load_bits"] == 128 and row["store_bits"] == 64 and row["spills"] == 0
    moved = 4 * (4 + 1)  # bytes per output: stride 2
    assert row["issue"] == pytest.approx(100e9 * 128 / 11 * moved / 1e12)
    assert row["exponential"] == pytest.approx(100e9 * 16 / 1 * moved / 1e12)
    assert row["memory"] == 1  # 100 SMs * 2048 threads * 16 bytes in flight, needed is 1e6
    (row,) = roofline.analyse([function], "9.0", gpu._replace(latency=10_000))
    assert row["memory"] == pytest.approx(100 * 2048 * 16 / 1e7)


def test_a_store_of_256_bits_counts_as_such():  # as nvcc has them for 10.0
    (row,) = roofline.analyse([listing("LDG.E.128", "MUFU.EX2", "STG.E.ENL2.256")], "10.0")
    assert row["store_bits"] == 256 and row["outputs"] == 8


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=r"arch must be one of 7.5, .*, got '6.0'"):
        roofline.roofline("6.0")


def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no cuda-something on PATH"):
        roofline.find_program("cuda-something")


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """The machine code of the library that an editable install has built."""
    library = ROOT / "mmsoftpool" / "libmmsoftpool_cuda.so"
    try:
        for name in ("cuobjdump", "nvdisasm"):
            roofline.find_program(name)
        if not library.exists():
            library = tmp_path_factory.mktemp("cubin") / "soft_pool.cubin"
            roofline.compile_kernels("9.0", library)
        return roofline.disassemble(library, "9.0")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    except ValueError as error:
        if library.suffix == ".cubin":
            raise
        pytest.skip(str(error))  # built for the GPU at hand


def by_case(functions, arch="9.0"):
    """What the kernels do, by direction, dtype, layout and window."""
    rows = roofline.analyse(list(functions), arch)
    return {(r["direction"], r["dtype"], r["layout"], r["kernel"]): r for r in rows}


@pytest.fixture(scope="module")
def kernels(functions):
    return by_case(functions)


# Instructions and special-function operations per output in the hot loop, for 9.0. A count may rise
# by half before the test fails, which leaves room for another compiler but not for a change that
# doubles it.
BUDGET = {
    ("forward", "float32", "contiguous", "k3 s2 p1"): (82, 10),
    ("forward", "float32", "channels_last", "k3 s2 p1"): (78, 10),
    ("forward", "float16", "contiguous", "k3 s2 p1"): (79, 10),
    ("forward", "float16", "channels_last", "k3 s2 p1"): (84, 10),
    ("forward", "bfloat16", "contiguous", "k3 s2 p1"): (82, 10),
    ("forward", "bfloat16", "channels_last", "k3 s2 p1"): (87, 10),
    ("forward", "float32", "contiguous", "k2 s2 p0"): (44, 5),
    ("forward", "float32", "channels_last", "k2 s2 p0"): (38, 5),
    ("forward", "float32", "contiguous", "k3 s1 p1"): (31, 3.12),
    ("forward", "float16", "contiguous", "k3 s1 p1"): (27, 2.25),
    ("forward", "float32", "channels_last", "k3 s1 p1"): (31, 2.25),
    ("forward", "float16", "channels_last", "k3 s1 p1"): (28, 2.25),
    ("backward", "float32", "contiguous", "k3 s2 p1"): (160, 15),
    ("backward", "float32", "channels_last", "k3 s2 p1"): (145, 15),
    ("backward", "float16", "contiguous", "k3 s2 p1"): (132, 12.5),
    ("backward", "float16", "channels_last", "k3 s2 p1"): (155, 15),
    ("backward", "bfloat16", "contiguous", "k3 s2 p1"): (137, 12),
    ("backward", "bfloat16", "channels_last", "k3 s2 p1"): (160, 15),
    ("backward", "float32", "contiguous", "k2 s2 p0"): (66, 5),
    ("backward", "float32", "channels_last", "k2 s2 p0"): (62, 5),
    ("backward", "float32", "contiguous", "k3 s1 p1"): (58, 3.75),
    ("backward", "float16", "contiguous", "k3 s1 p1"): (63, 3.75),
    ("backward", "float32", "channels_last", "k3 s1 p1"): (58, 3.75),
    ("backward", "float16", "channels_last", "k3 s1 p1"): (63, 3.75),
    ("forward", "float32", "contiguous", "k5 s1 p2"): (31, 2.5),
    ("forward", "float32", "channels_last", "k5 s1 p2"): (35, 2.5),
    ("forward", "float16", "contiguous", "k5 s1 p2"): (29, 2.5),
    ("forward", "float16", "channels_last", "k5 s1 p2"): (32, 2.5),
    ("forward", "float32", "contiguous", "k9 s1 p4"): (42, 4),
    ("forward", "float32", "channels_last", "k9 s1 p4"): (48, 4),
    ("forward", "float16", "contiguous", "k9 s1 p4"): (32, 3),
    ("forward", "float16", "channels_last", "k9 s1 p4"): (36, 3),
    ("forward", "float32", "contiguous", "k13 s1 p6"): (50, 5),
    ("forward", "float32", "channels_last", "k13 s1 p6"): (52, 5),
    ("forward", "float16", "contiguous", "k13 s1 p6"): (50, 5),
    ("forward", "float16", "channels_last", "k13 s1 p6"): (51, 5),
    ("backward", "float32", "contiguous", "k5 s1 p2"): (54, 3.5),
    ("backward", "float32", "channels_last", "k5 s1 p2"): (63, 3.5),
    ("backward", "float16", "contiguous", "k5 s1 p2"): (58, 3.5),
    ("backward", "float16", "channels_last", "k5 s1 p2"): (67, 3.5),
    ("backward", "float32", "contiguous", "k9 s1 p4"): (74, 5),
    ("backward", "float32", "channels_last", "k9 s1 p4"): (85, 5),
    ("backward", "float16", "contiguous", "k9 s1 p4"): (63, 4),
    ("backward", "float16", "channels_last", "k9 s1 p4"): (72, 4),
    ("backward", "float32", "contiguous", "k13 s1 p6"): (85, 6),
    ("backward", "float32", "channels_last", "k13 s1 p6"): (90, 6),
    ("backward", "float16", "contiguous", "k13 s1 p6"): (91, 6),
    ("backward", "float16", "channels_last", "k13 s1 p6"): (98, 6),
}


def is_within_budget(row, case):
    instructions, special = BUDGET[case]
    return row["instructions"] <= 1.5 * instructions and row["special"] <= 1.5 * special


@pytest.mark.parametrize("case", BUDGET, ids="-".join)
def test_a_kernel_keeps_its_instruction_budget(kernels, case):
    assert is_within_budget(kernels[case], case)
    assert kernels[case]["spills"] == 0


def test_twice_the_instructions_are_beyond_every_budget(functions):
    def twice(instruction):  # for the same outputs
        return [instruction] * (1 if instruction.opcode.startswith(("BRA", "BAR", "STG")) else 2)

    mutants = [
        f._replace(instructions=[j for i in f.instructions for j in twice(i)]) for f in functions
    ]
    rows = by_case(mutants)
    assert not any(is_within_budget(rows[case], case) for case in BUDGET)


def test_every_fast_kernel_has_its_prediction(kernels):
    rows = [row for row in kernels.values() if "issue" in row]
    # Directions and dtypes; layouts and poolings of strips, layouts and windows of rings.
    assert len(rows) == 2 * 3 * (3 * 3 + 2 * 6)
    assert all(row[key] > 0 for row in rows for key in ("issue", "exponential", "memory"))
    assert not any(row["spills"] for row in rows)


def test_the_tool_prints_and_writes_the_counts(monkeypatch, run_tool, tmp_path):
    row = roofline.analyse([listing("LDG.E.128", "MUFU.EX2", "STG.E")], "9.0")[0]
    monkeypatch.setattr(roofline, "roofline", lambda arch, gpu, library: [{**row, "arch": arch}])
    options = ("--arch", "9.0", "8.0", "--sms", 108, "--json", tmp_path / "sass.json")
    status, out, _ = run_tool("benchmark", "sass", *options)
    assert status == 0 and out.count("| forward float32 contiguous k3 s2 p1 |") == 2
    content = json.loads((tmp_path / "sass.json").read_text())
    assert content["assumptions"]["sms"] == 108
    assert [entry["arch"] for entry in content["rows"]] == ["9.0", "8.0"]


def test_an_assumption_must_be_positive(run_tool):
    status, _, err = run_tool("benchmark", "sass", "--clock", 0)
    assert status == 2 and err == "error: clock must be greater than 0, got 0.0\n"
