#!/usr/bin/env python
"""Measures the time and memory of SoftPool's operator, of the paper's pooling methods or of
detectors, side by side in one run.

Examples:
  python tools/benchmark.py op
  python tools/benchmark.py op --dtype float32 --kernel 3,2,1 --json op.json --plot op.png
  python tools/benchmark.py pooling --kernel 2,2,0
  python tools/benchmark.py model configs/retinanet_r50_softpool.py --size 800 1344
"""

import argparse
import itertools
import json
import os
import subprocess
import sys

import torch

from mmsoftpool import cli
from mmsoftpool.analysis import benchmark, paper
from mmsoftpool.files import write_atomically
from mmsoftpool.ops import backends


def kernel(text: str) -> tuple[int, int, int]:
    """Parses kernel_size,stride,padding."""
    try:
        size, stride, padding = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be kernel_size,stride,padding, such as 3,2,1, got {text!r}"
        ) from None
    return size, stride, padding


def show(title: str, rows: list[dict], columns: dict[str, str], base: dict) -> None:
    """Prints rows as a table: times in ms, memory in MiB, and ratios to the row ``base``."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns.values()):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        cells = []
        for key in columns:
            part, _, ratio = key.partition("/")
            value = row.get(part)
            if value is None:
                cells.append(row.get("error", "")[:60] if key == "forward" else "")
            elif ratio:
                cells.append(f"{value / base[part]:.2f}" if base.get(part) else "")
            elif part.endswith("_memory"):
                cells.append(f"{value / 2**20:.0f}")
            elif part.endswith("_bandwidth"):
                cells.append(f"{value / 1e9:.0f}")
            elif part.endswith("_of_copy"):
                cells.append(f"{value:.0%}")
            else:
                cells.append(f"{value * 1e3:.2f}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    Console(width=None if os.isatty(1) else 160).print(table)


def run_op(args) -> list[dict]:
    rows = []
    cases = list(itertools.product(args.dtype, args.layout, args.kernel))
    for i, (dtype, layout, pooling) in enumerate(cases):
        title = f"{i + 1}/{len(cases)}: {args.device}, {dtype}, {layout}, k, s, p = {pooling}"
        print(f"{title} ...", flush=True)
        case = benchmark.benchmark_pooling(
            args.device, dtype, layout, pooling, tuple(args.shape), args.rounds
        )
        columns = {
            "method": "method",
            "forward": "fwd ms",
            "forward/ratio": "/ ours",
            "backward": "bwd ms",
            "backward/ratio": "/ ours",
            "both": "both ms",
            "both/ratio": "/ ours",
            "forward_bandwidth": "fwd GB/s",
            "forward_bandwidth_of_copy": "of copy",
            "backward_bandwidth_of_copy": "bwd of copy",
            "forward_memory": "fwd MiB",
            "both_memory": "both MiB",
        }
        show(title, case, columns, base=case[1])
        rows += case
    return rows


def run_pooling(args) -> list[dict]:
    rows = []
    cases = list(itertools.product(args.dtype, args.layout, args.kernel))
    for i, (dtype, layout, pooling) in enumerate(cases):
        title = f"{i + 1}/{len(cases)}: {args.device}, {dtype}, {layout}, k, s, p = {pooling}"
        print(f"{title} ...", flush=True)
        case = benchmark.benchmark_pooling(
            args.device, dtype, layout, pooling, tuple(args.shape), args.rounds, "methods"
        )[1:]  # without the copy
        for row in case:
            forward, backward = paper.LATENCY[row["method"]][args.device]
            row.update(paper_forward=forward / 1e3, paper_backward=backward / 1e3)
        columns = {
            "method": "method",
            "forward": "fwd ms",
            "forward/ratio": "/ average",
            "backward": "bwd ms",
            "backward/ratio": "/ average",
            "forward_memory": "fwd MiB",
            "forward_memory/ratio": "/ average",
            "both_memory": "both MiB",
            "both_memory/ratio": "/ average",
            "paper_forward": "paper fwd",
            "paper_forward/ratio": "/ average",
            "paper_backward": "paper bwd",
            "paper_backward/ratio": "/ average",
        }
        show(title, case, columns, base=case[0])
        rows += case
    return rows


def run_model(args) -> list[dict]:
    rows = benchmark.benchmark_models(
        args.configs, args.device, tuple(args.size), args.batch_size, args.rounds
    )
    columns = {
        "config": "config",
        "train": "train ms",
        "train/ratio": "/ first",
        "inference": "inference ms",
        "inference/ratio": "/ first",
        "train_memory": "train MiB",
        "inference_memory": "inference MiB",
    }
    show(f"{args.device}, {args.batch_size} images of {args.size}", rows, columns, base=rows[0])
    return rows


def make_parser():
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, help="what to measure")
    op = commands.add_parser("op", help="SoftPool's operator and its alternatives")
    pooling = commands.add_parser(
        "pooling", help="the pooling methods of the paper's Table 3, beside its times"
    )
    for command, layouts, shape in (
        (op, list(benchmark.LAYOUTS), [4, 64, 400, 672]),
        # A stem on ImageNet, as in the paper.
        (pooling, ["contiguous"], [8, 64, 112, 112]),
    ):
        command.add_argument(
            "--dtype",
            nargs="+",
            choices=benchmark.DTYPES,
            default=["float32"],
            help="the data types of the input (default: float32)",
        )
        command.add_argument(
            "--layout",
            nargs="+",
            choices=benchmark.LAYOUTS,
            default=layouts,
            help=f"the memory formats of the input (default: {' '.join(layouts)})",
        )
        command.add_argument(
            "--kernel",
            nargs="+",
            type=kernel,
            default=[(3, 2, 1), (2, 2, 0)],
            metavar="K,S,P",
            help="the poolings, each as kernel_size,stride,padding (default: 3,2,1 2,2,0)",
        )
        command.add_argument(
            "--shape",
            nargs=4,
            type=int,
            default=shape,
            metavar=("N", "C", "H", "W"),
            help=f"the shape of the input (default: {' '.join(map(str, shape))})",
        )
        command.add_argument(
            "--plot", metavar="FILE", help="save a picture of the times to this file"
        )
    model = commands.add_parser("model", help="a training iteration and the inference of detectors")
    model.add_argument("configs", nargs="+", metavar="CONFIG", help="a config file")
    model.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=[800, 1344],
        metavar=("H", "W"),
        help="the height and width of the images (default: 800 1344)",
    )
    model.add_argument(
        "--batch-size",
        type=int,
        default=2,
        metavar="N",
        help="the number of images of an iteration (default: %(default)s)",
    )
    for command in (op, pooling, model):
        command.add_argument(
            "--device",
            choices=["cpu", "cuda"],
            help="the device to measure (default: cuda if there is a GPU)",
        )
        command.add_argument(
            "--capability",
            choices=["default", "avx2", "avx512"],
            help="the instruction set of the CPU, for SoftPool and for torch (default: the widest "
            "that the machine has)",
        )
        command.add_argument(
            "--threads",
            type=int,
            metavar="N",
            help="the number of CPU threads (default: torch's default)",
        )
        command.add_argument(
            "--rounds",
            type=int,
            default=15,
            metavar="N",
            help="the number of rounds; the results are medians over them (default: %(default)s)",
        )
        command.add_argument("--json", metavar="FILE", help="save all numbers to this JSON file")
    return parser


def main(args):
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu, because torch finds no GPU, got cuda")
    for name, value in (("threads", args.threads), ("rounds", args.rounds)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.capability not in (None, os.environ.get("ATEN_CPU_CAPABILITY")):
        # torch has read the variable by now.
        variables = {**os.environ, "ATEN_CPU_CAPABILITY": args.capability}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=variables).returncode)
    if args.capability not in (None, backends.cpu_capability()):
        raise ValueError(
            f"capability must be one that the machine has, up to {backends.cpu_capability()}, got "
            f"{args.capability}"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    run = {"op": run_op, "pooling": run_pooling, "model": run_model}[args.command]
    rows = run(args)
    if args.json:
        content = dict(environment=benchmark.environment(args.device), rows=rows)
        with write_atomically(args.json) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
        print(f"wrote {args.json}")
    if args.command != "model" and args.plot:
        benchmark.plot(rows, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    cli.run(main, make_parser())
