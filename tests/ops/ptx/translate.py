"""Translates the PTX of the CUDA kernels, instruction by instruction, to C++.

A register holds bits, as in PTX; the instructions say what they mean. An instruction that is not
known here is an error. ``machine.h`` has what needs more than an expression, and the memory.
"""

import re
from pathlib import Path

_C_TYPES = {8: "uint8_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}
# What a register has before it is written: NaN as a number, far out as an address.
_POISON = {1: "true", 16: "0x7fd5", 32: "0x7fd5dead", 64: "0x7ff5deadbeef1234ull"}
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_FUNCTIONS = {
    "ex2.approx.ftz.f32": "exp2_approx",
    "rcp.approx.ftz.f32": "reciprocal_approx",
    "div.approx.f32": "divide_approx",
    "rcp.approx.ftz.f64": "reciprocal_approx",
    "max.NaN.f32": "max_or_nan",
    **{f"{name}.{t}": f"{name}imum" for name in ("min", "max") for t in ("f32", "f64")},
}
# The result's type and an expression of the operand's bits.
_CONVERSIONS = {
    "f32.f16": "from_half({0})",
    "f32.bf16": "uint32_t({0}) << 16",
    "rn.f16.f32": "to_half(as<float>({0}))",
    "rn.bf16.f32": "to_bfloat16(as<float>({0}))",
    "rn.f16x2.f32": "uint32_t(to_half(as<float>({0}))) << 16 | to_half(as<float>({1}))",
    "rn.bf16x2.f32": "uint32_t(to_bfloat16(as<float>({0}))) << 16 | to_bfloat16(as<float>({1}))",
    "f64.f32": "bits(double(as<float>({0})))",
    "rn.f32.f64": "bits(float(as<double>({0})))",
}


def _width(type_name: str) -> int:
    if type_name == "pred":
        return 1
    return 32 if type_name.endswith("x2") else int(re.sub(r"\D", "", type_name))


def _split(operands: str) -> list[str]:
    """The operands of an instruction; those in braces or brackets are one."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", operands)]


def _name(register: str) -> str:
    return re.sub(r"\W", "_", register.strip().lstrip("%$"))


def _bits(operand: str, type_name: str) -> str:
    """A C expression of the bits of an operand."""
    width = _width(type_name)
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", operand):
        return f"0x{operand[2:]}ull" if operand[1] == "d" else f"0x{operand[2:]}u"
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", operand):
        return f"bool({operand})" if width == 1 else f"{_C_TYPES[width]}({operand}ll)"
    special = re.fullmatch(r"%(tid|ctaid|ntid)\.x", operand)
    return f"t.{special.group(1)}" if special else _name(operand)


def _value(operand: str, type_name: str) -> str:
    """A C expression of the number that an operand is."""
    bits, width = _bits(operand, type_name), _width(type_name)
    if type_name[0] == "f":
        return f"as<{'float' if width == 32 else 'double'}>({bits})"
    return f"int{width}_t({bits})" if type_name[0] == "s" else f"({bits})"


def _set(register: str, type_name: str, value: str) -> str:
    width = _width(type_name)
    if type_name[0] == "f" and width >= 32:
        return f"{_name(register)} = bits({'float' if width == 32 else 'double'}({value}));"
    return f"{_name(register)} = {'bool' if width == 1 else _C_TYPES[width]}({value});"


def _memory(opcode: list[str], operands: list[str], parameters: dict[str, int], line: int) -> str:
    """A load or a store of a number or of a vector."""
    space, type_name = opcode[1], opcode[-1]
    count = next((int(part[1]) for part in opcode if part in ("v2", "v4")), 1)
    c_type = _C_TYPES[_width(type_name)]
    size = count * _width(type_name) // 8
    is_load = opcode[0] == "ld"
    where, what = operands if not is_load else operands[::-1]
    base, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", where).groups()
    address = f"{parameters.get(base, _name(base))} + {offset or 0}ll"
    registers = _split(what[1:-1]) if count > 1 else [what]
    if not is_load:
        numbers = ", ".join(f"{c_type}({_bits(r, type_name)})" for r in registers)
        return f"{{ const {c_type} v[] = {{{numbers}}}; t.store({address}, {size}, v, {line}); }}"
    function = "parameter" if space == "param" else "load"
    gets = [f"{_name(r)} = v[{i}];" for i, r in enumerate(registers) if r != "_"]
    return (
        f"{{ {c_type} v[{count}]; t.{function}({address}, {size}, v, {line}); {' '.join(gets)} }}"
    )


def _compare(comparison: str, x: str, y: str, is_float: bool) -> str:
    if comparison in ("num", "nan"):
        return f"({x} == {x} && {y} == {y}) == {'true' if comparison == 'num' else 'false'}"
    if not is_float or comparison in _COMPARISONS:
        sign = {**_COMPARISONS, **_UNSIGNED}[comparison]
        if is_float and comparison == "ne":
            return f"{x} < {y} || {x} > {y}"
        return f"{x} {sign} {y}"
    # Or unordered.
    sign = _COMPARISONS[comparison[:-1]]
    return f"{x} {sign} {y} || {x} != {x} || {y} != {y}"


def _instruction(opcode: str, operands: list[str], parameters: dict[str, int], line: int) -> str:
    """One statement."""
    parts = opcode.split(".")
    name, t = parts[0], parts[-1]
    values = [] if name in ("ld", "st", "mov") else [_value(o, t) for o in operands[1:]]
    if name in ("ld", "st"):
        return _memory(parts, operands, parameters, line)
    if name == "mov":
        to, source = operands
        if to[0] == "{":
            registers = _split(to[1:-1])
            width = _width(t) // len(registers)
            return " ".join(
                f"{_name(r)} = {_C_TYPES[width]}({_bits(source, t)} >> {i * width});"
                for i, r in enumerate(registers)
                if r != "_"
            )
        if source[0] == "{":
            registers = _split(source[1:-1])
            width = _width(t) // len(registers)
            whole = (
                f"{_C_TYPES[_width(t)]}({_C_TYPES[width]}({_bits(r, f'b{width}')})) << {i * width}"
                for i, r in enumerate(registers)
            )
            return f"{_name(to)} = {' | '.join(whole)};"
        source = str(parameters[source]) if source in parameters else _bits(source, t)
        return f"{_name(to)} = {source};"
    if name == "cvta":
        return f"{_name(operands[0])} = {_bits(operands[1], t)};"
    if name == "setp":
        return _set(operands[0], "pred", _compare(parts[1], *values, t[0] == "f"))
    if name == "selp":
        x, y, condition = operands[1:]
        return _set(
            operands[0], "b" + t[1:], f"{_bits(condition, 'pred')} ? {_bits(x, t)} : {_bits(y, t)}"
        )
    if opcode in _FUNCTIONS:
        return _set(operands[0], t, f"{_FUNCTIONS[opcode]}({', '.join(values)})")
    if name == "fma" and parts[1] == "rn":
        return _set(operands[0], t, f"std::fma({', '.join(values)})")
    if name in ("mul", "mad") and parts[1] in ("lo", "hi", "wide"):
        wide = f"{t[0]}{2 * _width(t)}"
        if parts[1] == "lo":
            product = f"{_bits(operands[1], t)} * {_bits(operands[2], t)}"
        elif parts[1] == "hi":
            product = f"multiply_high({values[0]}, {values[1]})"
        else:
            wider = f"{'int' if t[0] == 's' else 'uint'}{2 * _width(t)}_t"
            product = f"{wider}({values[0]}) * {values[1]}"
        t = wide if parts[1] == "wide" else t
        if name == "mad":
            product = f"{product} + {_bits(operands[3], t)}"
        return _set(operands[0], t, product)
    if name in ("div", "rem") and t[0] in "us":
        return _set(operands[0], t, f"t.{name}({values[0]}, {values[1]}, {line})")
    if name == "rcp" and parts[1] == "rn":
        return _set(operands[0], t, f"1 / {values[0]}")
    if name in ("min", "max") and t[0] in "us":
        return _set(operands[0], t, f"std::{name}({values[0]}, {values[1]})")
    if name in _OPERATORS and (len(parts) == 2 or parts[1] == "rn"):
        return _set(operands[0], t, f"{values[0]} {_OPERATORS[name]} {values[1]}")
    if name == "not":
        return _set(operands[0], t, f"{'!' if t == 'pred' else '~'}{values[0]}")
    if name in ("neg", "abs") and t[0] == "f":
        sign = f"(uint{_width(t)}_t(1) << {_width(t) - 1})"
        change = f"^ {sign}" if name == "neg" else f"& ~{sign}"
        return f"{_name(operands[0])} = {_bits(operands[1], t)} {change};"
    if name == "neg":
        return _set(operands[0], t, f"0 - {_bits(operands[1], t)}")
    if name in ("shl", "shr"):
        function = "shift_left" if name == "shl" else "shift_right"
        return _set(operands[0], t, f"{function}({values[0]}, {_bits(operands[2], 'b32')})")
    if name in ("lop3", "prmt"):
        return _set(operands[0], t, f"{name}({', '.join(_bits(o, t) for o in operands[1:])})")
    if name == "shf":
        return _set(
            operands[0],
            t,
            f"shift_funnel_{parts[1]}({', '.join(_bits(o, t) for o in operands[1:])})",
        )
    if name == "copysign":
        sign = f"(uint{_width(t)}_t(1) << {_width(t) - 1})"
        x, y = (_bits(o, t) for o in operands[1:])
        return f"{_name(operands[0])} = ({x} & {sign}) | ({y} & ~{sign});"
    if name == "cvt":
        conversion = ".".join(parts[1:])
        if conversion in _CONVERSIONS:
            arguments = [_bits(o, t) for o in operands[1:]]
            return f"{_name(operands[0])} = {_CONVERSIONS[conversion].format(*arguments)};"
        if len(parts) == 3 and parts[1][0] in "us" and t[0] in "us":
            source = f"{'int' if t[0] == 's' else 'uint'}{t[1:]}_t({_name(operands[1])})"
            to = f"{'int' if parts[1][0] == 's' else 'uint'}{parts[1][1:]}_t"
            return f"{_name(operands[0])} = {to}({source});"
    raise ValueError(f"line {line}: unknown instruction {opcode} {', '.join(operands)}")


_DECLARATION = re.compile(r"\.reg \.(\w+) (.*)")


def _function(body: list[tuple[int, str]], parameters: dict[str, int], number: int) -> list[str]:
    """A kernel as a C++ function, from its numbered lines."""
    lines = [f"void kernel_{number}(Thread& t) {{"]
    for line, text in body:
        declaration = _DECLARATION.match(text)
        label = re.match(r"(\$\w+):", text)
        guarded = re.match(r"@(!?)(%\w+)\s+(.*)", text)
        if declaration:
            width = _width(declaration.group(1))
            c_type = "bool" if width == 1 else _C_TYPES[width]
            names = []
            for register in declaration.group(2).split(","):
                name, _, count = register.strip(" >").partition("<")
                names += (
                    [_name(name) + str(i) for i in range(int(count))] if count else [_name(name)]
                )
            lines.append(f"{c_type} {', '.join(f'{n} = {_POISON[width]}' for n in names)};")
            continue
        if label:
            lines.append(f"{_name(label.group(1))}:;")
            continue
        if text.startswith((".pragma", ".loc", "//")) or not text.strip("{} "):
            lines.append(text if text in ("{", "}") else "")
            continue
        guard = f"if ({guarded.group(1)}{_name(guarded.group(2))}) " if guarded else ""
        opcode, _, operands = (guarded.group(3) if guarded else text).partition(" ")
        if opcode in ("bra", "bra.uni"):
            lines.append(f"{guard}goto {_name(operands)};")
        elif opcode == "ret":
            lines.append(f"{guard}return;")
        else:
            statement = _instruction(opcode, _split(operands), parameters, line)
            lines.append(f"{guard}{{ {statement} }}" if guard else statement)
    return [*lines, "}"]


def translate(ptx: str, folder: Path, parts: int) -> list[Path]:
    """Writes ``parts`` C++ files with the kernels of a PTX file, and one with their table.

    Raises:
        ValueError: For an instruction that is not known here.
    """
    kernels, table = [], []
    lines = [re.sub(r"\s+", " ", line.split("//")[0]).strip() for line in ptx.split("\n")]
    i = 0
    while i < len(lines):
        entry = re.search(r"\.entry (\S+?)\($", lines[i])
        i += 1
        if not entry:
            continue
        parameters, size = {}, 0
        while not lines[i].startswith(")"):
            align, width, name, count = re.match(
                r"\.param (?:\.align (\d+) )?\.(\w+) "
                r"(?:\.ptr (?:\.\w+ )?(?:\.align \d+ )?)?(\w+)(?:\[(\d+)\])?",
                lines[i],
            ).groups()
            length = int(count) if count else _width(width) // 8
            step = int(align) if align else length
            size = -(-size // step) * step
            parameters[name] = size
            table.append((len(kernels), size, length))
            size += length
            i += 1
        i = lines.index("{", i)
        body, depth = [], 1
        while depth > 0:
            i += 1
            for text in re.findall(r"^\{|\}|[^;}{]+(?:\{[^}]*\}[^;{}]*)*", lines[i]):
                depth += (text == "{") - (text == "}")
                if text.strip() and depth > 0:
                    body.append((i + 1, text.strip()))
        kernels.append((entry.group(1), size, _function(body, parameters, len(kernels))))
    paths = [folder / f"kernels_{part}.cpp" for part in range(parts)]
    groups = [[] for _ in paths]
    for kernel in sorted(kernels, key=lambda kernel: -len(kernel[2])):
        min(groups, key=lambda group: sum(len(k[2]) for k in group)).append(kernel)
    for path, group in zip(paths, groups, strict=True):
        text = "\n".join("\n".join(kernel[2]) for kernel in group)
        path.write_text(f'#include "machine.h"\n{text}\n')
    functions = [f"void kernel_{number}(Thread&);" for number in range(len(kernels))]
    rows = []
    for number, (name, size, _) in enumerate(kernels):
        spans = ", ".join(f"{{{at}, {length}}}" for n, at, length in table if n == number)
        rows.append(f'{{"{name}", kernel_{number}, {size}, {{{spans}}}}},')
    table_path = folder / "table.cpp"
    table_path.write_text(
        "\n".join(
            [
                '#include "machine.h"',
                *functions,
                "const std::vector<Kernel> kernels = {",
                *rows,
                "};",
            ]
        )
    )
    return [*paths, table_path]
