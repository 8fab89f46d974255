#!/usr/bin/env python
"""Tests, sanitizes and measures the operator on a GPU and writes one JSON and one Markdown file.

Needs torch and pytest. Build the libraries first, or let `make gpu-report` do both:
  python setup.py -q build_ext --inplace

Examples:
  python benchmarks/gpu_report.py
  python benchmarks/gpu_report.py --dry-run
  python benchmarks/gpu_report.py --device cpu --shape 1 8 32 32 --rounds 1 --cases 1 --out /tmp

The parts run one after the other, each with a limit; the files are written anew after every step,
so that a run that is cut off keeps what it has. Measurements run in a process of their own: an
error of a kernel, after which no other kernel runs in a process, costs one step.
"""

import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import benchmark
import roofline
from mmsoftpool import cli
from mmsoftpool.errors import UserError
from mmsoftpool.files import write_atomically
from mmsoftpool.ops import backends

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "roofline", "operator", "sanitizer", "detectors")
#: kernel_size, stride, padding: stems, and a large window.
POOLINGS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 1, 2)]
CONFIGS = [
    f"configs/{name}_r50_{pool}pool.py"
    for name in ("retinanet", "mask_rcnn")
    for pool in ("soft", "max")
]
#: Tests that reach every kernel, few enough for the sanitizer, which slows them down a lot.
SANITIZED = "special_values or misaligned or one_and_three or empty_batch"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")


def operator_cases() -> list[tuple]:
    """Returns the operator's cases as (dtype, layout, pooling), the stem's first."""
    return [
        (dtype, layout, pooling)
        for pooling in POOLINGS
        for dtype, layout in itertools.product(benchmark.DTYPES, benchmark.LAYOUTS)
    ]


def commands() -> dict[str, list[list[str]]]:
    """Returns the command lines of the parts that run as programs."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_cuda.py"]
    sanitizer = [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"] for tool in SANITIZER_TOOLS
    ]
    return dict(
        tests=[[sys.executable, *pytest, "-m", "cuda"]],
        sanitizer=[[*tool, sys.executable, *pytest, "-k", SANITIZED] for tool in sanitizer],
    )


def run_program(command: list[str], seconds: float) -> dict[str, object]:
    """Runs a command in the checkout for some time at most.

    Returns:
        ``command``; ``status``, the exit status, None where it was stopped; ``seconds``;
        ``summary``, the last line of the output; ``output``, its end, if it failed. Or ``skipped``
        where there is no such program.
    """
    try:
        program = roofline.find_program(command[0])
    except FileNotFoundError as error:
        return dict(skipped=str(error))
    begin = time.monotonic()
    process = subprocess.Popen(
        [program, *command[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the sanitizer starts a process of its own, to stop with it
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = f"{process.communicate()[0]}\nstopped after {seconds:.0f} s"
        status = None
    lines = output.strip().splitlines() or [""]
    row = dict(command=" ".join(command), status=status, seconds=time.monotonic() - begin)
    row["summary"] = lines[-1].strip("= ")
    if status != 0:
        row["output"] = "\n".join(lines[-40:])
    return row


def in_processes(
    function: Callable[..., list[dict]], cases: list[tuple], deadline: float
) -> Iterable[tuple[tuple, list[dict] | str]]:
    """Calls a function for one case after the other in another process.

    Where that process ends early, a new one continues with the next case.

    Args:
        function: Of a module, takes a case's items, returns what can be pickled.
        cases: The arguments.
        deadline: When to stop, in the clock of :func:`time.monotonic`.

    Yields:
        tuple: The case, and its result, or in words why there is none.
    """
    context = multiprocessing.get_context("spawn")
    cases = list(cases)
    while cases and time.monotonic() < deadline:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_call_all, args=(function, cases, sender), daemon=True)
        process.start()
        sender.close()
        try:
            while cases:
                if not receiver.poll(max(0, deadline - time.monotonic())):
                    break
                try:
                    result = receiver.recv()
                except EOFError:
                    process.join()
                    yield cases.pop(0), f"the process ended with status {process.exitcode}"
                    break
                yield cases.pop(0), result
                if isinstance(result, str) and "CUDA" in result:
                    break  # no other kernel runs in this process
        finally:
            process.terminate()
            process.join()
    for case in cases:
        yield case, "no time left"


def _call_all(function, cases, sender):
    for case in cases:
        try:
            result = function(*case)
        except Exception as error:
            result = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        sender.send(result)


def measure_operator(device, shape, rounds, dtype, layout, pooling) -> list[dict]:
    """Measures one case, see :func:`benchmark.benchmark_pooling`."""
    rows = benchmark.benchmark_pooling(device, dtype, layout, pooling, shape, rounds)
    if not benchmark.environment(device)["compiled"]:
        raise RuntimeError(f"no compiled library runs on {device}")
    return rows


def measure_detectors(device, size, rounds, *configs) -> list[dict]:
    """Measures detectors, see :func:`benchmark.benchmark_models`."""
    paths = [str(ROOT / config) for config in configs]
    rows = benchmark.benchmark_models(paths, device, size, batch_size=2, rounds=rounds)
    return [dict(row, config=config) for row, config in zip(rows, configs, strict=True)]


class Report:
    """The report of a device, kept in a JSON and a Markdown file.

    Args:
        device: ``'cuda'``, or ``'cpu'`` for a rehearsal.
        folder: Where to write the files, named after the device.
        minutes: After how many minutes to stop.
        shape: Shape of the operator's input.
        size: Height and width of the detectors' images.
        rounds: Rounds of the medians.
        cases: How many of the operator's cases to measure. Defaults to all.

    Raises:
        UserError: If the device is ``'cuda'`` and torch finds no GPU.
        FileNotFoundError: If there is no such folder.
    """

    def __init__(self, device, folder, minutes, shape, size, rounds, cases=None):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device must be cpu, because torch finds no GPU, got cuda")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder {folder} to write the report into")
        self.device, self.shape, self.size, self.rounds = device, shape, size, rounds
        self.cases = operator_cases()[:cases]
        self.begin = time.monotonic()
        self.deadline = self.begin + 60 * minutes
        environment = benchmark.environment(device)
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            environment.update(
                capability="{}.{}".format(*torch.cuda.get_device_capability()),
                sms=properties.multi_processor_count,
                memory=properties.total_memory,
                **_nvidia_smi(),
            )
        slug = re.sub(r"[^a-z0-9]+", "_", environment["device"].lower()).strip("_")
        self.path = Path(folder) / f"{slug}_report.json"
        self.content = dict(environment=environment, parts={})

    def run(self, parts: Iterable[str] = PARTS) -> None:
        """Runs the parts, in order, and writes the files after each of their steps."""
        for part in parts:
            print(f"== {part}, {time.monotonic() - self.begin:.0f} s", flush=True)
            for rows in getattr(self, part)():
                self.content["parts"].setdefault(part, []).extend(rows)
                self.content["seconds"] = time.monotonic() - self.begin
                self.save()
                print(*map(_line, rows), sep="\n", flush=True)
        print(f"\n{self.markdown()}\nwrote {self.path} and {self.path.with_suffix('.md')}")

    def save(self) -> None:
        """Writes both files."""
        with write_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1))
        with write_atomically(self.path.with_suffix(".md")) as temporary:
            temporary.write_text(self.markdown())

    def left(self, share: float) -> float:
        """Returns a share of the remaining time in seconds."""
        return max(0.0, share * (self.deadline - time.monotonic()))

    def tests(self):
        """Runs the operator's tests on the GPU; yields a row for each program."""
        for command in commands()["tests"]:
            yield [run_program(command, self.left(0.4))]

    def sanitizer(self):
        """Runs some of the tests under each tool of compute-sanitizer."""
        for i, command in enumerate(commands()["sanitizer"]):
            yield [run_program(command, self.left(0.8 / (len(SANITIZER_TOOLS) - i)))]

    def roofline(self):
        """Counts the kernels' instructions and predicts their speed on this device."""
        environment = self.content["environment"]
        arch = environment.get("capability", "9.0")
        gpu = roofline.H200
        if self.device == "cuda":
            gpu = gpu._replace(name=environment["device"], sms=environment["sms"])
            if "clock" in environment:
                gpu = gpu._replace(clock=environment["clock"])
        try:
            library = backends.find_library("cuda").path
            rows = roofline.roofline(arch, gpu, library)
            yield [dict(row, gpu=gpu._asdict()) for row in rows]
        except (ValueError, FileNotFoundError) as error:
            yield [dict(skipped=" ".join(str(error).split()))]

    def operator(self):
        """Measures the operator for every dtype, layout and window; yields the rows of a case."""
        cases = [(self.device, self.shape, self.rounds, *case) for case in self.cases]
        deadline = time.monotonic() + self.left(0.7)
        for case, result in in_processes(measure_operator, cases, deadline):
            if isinstance(result, str):
                yield [dict(case=case[3:], skipped=result)]
            else:
                yield result

    def detectors(self):
        """Measures RetinaNet-R50 and Mask R-CNN with each pool, if mmdet is installed."""
        if importlib.util.find_spec("mmdet") is None:
            yield [dict(skipped="mmdet is not installed")]
            return
        rounds = min(self.rounds, 5)
        cases = [
            (self.device, self.size, rounds, *CONFIGS[i : i + 2]) for i in range(0, len(CONFIGS), 2)
        ]
        for case, result in in_processes(measure_detectors, cases, self.deadline):
            if isinstance(result, str):
                yield [dict(case=case[3:], skipped=result)]
            else:
                yield result

    def markdown(self) -> str:
        """Formats the report as Markdown."""
        environment, parts = self.content["environment"], self.content["parts"]
        lines = [f"# {environment['device']}", ""]
        if self.device == "cpu":
            lines += ["A rehearsal on the CPU: nothing here ran on a GPU.", ""]
        lines += [", ".join(f"{key} {value}" for key, value in environment.items()), ""]
        for part, steps in parts.items():
            lines += [f"## {part.capitalize()}", ""]
            lines += [_line(step) for step in steps if "skipped" in step]
            steps = [step for step in steps if "skipped" not in step]
            if part in ("tests", "sanitizer"):
                lines += [_line(step) for step in steps]
            elif part == "operator":
                lines += operator_table(steps, parts.get("roofline", []))
            elif part == "roofline" and steps:
                lines += [roofline.table(steps)]
            elif part == "detectors" and steps:
                lines += detector_table(steps)
            lines.append("")
        return "\n".join(lines)


def _line(step: dict) -> str:
    """Formats a row of any part as a list item."""
    if "skipped" in step:
        return f"- {' '.join(map(str, [*step.get('case', ()), 'skipped']))}: {step['skipped']}"
    if "command" in step:
        state = {0: "passed", None: "did not finish"}.get(step["status"], "FAILED")
        return f"- {state} in {step['seconds']:.0f} s: {step['summary']} (`{step['command']}`)"
    if "registers" in step:
        return "- {direction} {dtype} {layout} {kernel}: a loop of {loop} instructions".format(
            **step
        )
    if "train" in step:
        return f"- {step['config']}: {step['train'] * 1e3:.1f} ms a training iteration"
    if "error" in step:
        return f"- {step['method']}: {step['error']}"
    return "- {dtype} {layout} {pooling} {method}: {forward:.3g} s".format(**step)


def operator_table(rows: list[dict], predictions: list[dict]) -> list[str]:
    """Shares of the copy bandwidth, measured and predicted, and times relative to SoftPool's.

    Args:
        rows: From :func:`benchmark.benchmark_pooling`, of several cases.
        predictions: From :func:`roofline.roofline`; those of other kernels are ignored.
    """
    predicted = {
        tuple(row[key] for key in ("direction", "dtype", "layout", "kernel")): min(
            row[key] for key in ("issue", "exponential", "memory")
        )
        for row in predictions
        if "issue" in row
    }
    cases = {}
    for row in rows:
        case = (row["dtype"], row["layout"], tuple(row["pooling"]))
        cases.setdefault(case, {})[row["method"]] = row
    others = list(dict.fromkeys(m for case in cases.values() for m in case))
    others = [name for name in others if name not in ("copy", "soft_pool2d")]
    lines = [
        f"| case | part | of copy | predicted | ms | {' | '.join(others)} |",
        "|---|---|" + (3 + len(others)) * "---:|",
    ]
    for (dtype, layout, pooling), methods in cases.items():
        ours = methods.get("soft_pool2d", {})
        kernel = "k{} s{} p{}".format(*pooling)
        for part in ("forward", "backward"):
            if part not in ours:
                continue
            share = predicted.get((part, dtype, layout, kernel))
            ratios = [methods.get(name, {}).get(part) for name in others]
            cells = [
                f"{dtype} {layout} {kernel}",
                part,
                f"{ours[f'{part}_bandwidth_of_copy']:.0%}",
                f"{min(share, 1):.0%}" if share else "",
                f"{ours[part] * 1e3:.3f}",
                *(f"{time / ours[part]:.2f}" if time else "fails" for time in ratios),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "The columns of other methods are their times in SoftPool's."]


def detector_table(rows: list[dict]) -> list[str]:
    """Formats the rows of :func:`measure_detectors` as a table, times in ms, memory in MiB."""
    lines = ["| config | training, ms | inference, ms | training, MiB |", "|---|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['config']} | {row['train'] * 1e3:.1f} | {row['inference'] * 1e3:.1f} "
            f"| {row['train_memory'] / 2**20:.0f} |"
        )
    return lines


def _nvidia_smi() -> dict[str, object]:
    """Returns the driver and the highest clock in Hz; nothing if nvidia-smi fails."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=True)
        driver, clock = result.stdout.splitlines()[0].split(", ")
        return dict(driver=driver, clock=float(clock.split()[0]) * 1e6)
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return {}


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="the device to measure; cpu is a rehearsal (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, and run nothing"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        metavar="PART",
        help="the parts to run: tests, roofline, operator, sanitizer, detectors (default: all)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="stop after so many minutes; the build takes one more (default: %(default)s)",
    )
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        default=[4, 64, 400, 672],
        metavar=("N", "C", "H", "W"),
        help="the shape of the operator's input (default: 4 64 400 672)",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=[800, 1344],
        metavar=("H", "W"),
        help="the height and width of the detectors' images (default: 800 1344)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        metavar="N",
        help="the number of rounds; the results are medians over them (default: %(default)s)",
    )
    parser.add_argument(
        "--cases",
        type=int,
        metavar="N",
        help="measure the operator in the first N cases only (default: all)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=str(Path(__file__).parent / "results"),
        help="the folder of the files, named after the device (default: benchmarks/results)",
    )
    return parser


def main(args):
    args.parts = args.parts or PARTS
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise UserError(f"parts must be among {', '.join(PARTS)}, got {unknown}")
    for name in ("minutes", "rounds", "cases"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} must be greater than 0, got {value}")
    if args.dry_run:
        programs = commands()
        for part in args.parts:
            print(f"== {part}")
            for command in programs.get(part, []):
                print(shlex.join(command))
            if part == "operator":
                for case in operator_cases()[: args.cases]:
                    print(*case)
            if part == "detectors":
                print(*CONFIGS, sep="\n")
        return
    report = Report(
        *(args.device, args.out, args.minutes, tuple(args.shape), tuple(args.size), args.rounds),
        args.cases,
    )
    report.run(args.parts)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
