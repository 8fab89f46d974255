#!/usr/bin/env python
"""Measures the time and memory of SoftPool's operator, of the paper's pooling methods or of
detectors, side by side in one run; or predicts the operator's time on a GPU from the machine code.

Examples:
  python tools/benchmark.py op
  python tools/benchmark.py op --dtype float32 --kernel 3,2,1 --json op.json --plot op.png
  python tools/benchmark.py op --methods soft_pool2d F.avg_pool2d F.max_pool2d
  python tools/benchmark.py pooling --kernel 2,2,0
  python tools/benchmark.py model configs/retinanet_r50_softpool.py --size 800 1344
  python tools/benchmark.py sass --arch 9.0 8.0 --json sass.json
"""

import argparse
import itertools
import json
import os

import cli

KERNELS = [(3, 2, 1), (2, 2, 0)]
STEM = (4, 64, 400, 672)  # a ResNet's at 800 x 1344
# What `op` measures by default: besides the stem the overlapping windows of YOLO's SPP and global
# pooling.
OP_CASES = [
    *((STEM, pooling) for pooling in KERNELS),
    ((8, 256, 40, 40), (5, 1, 2)),
    ((8, 256, 20, 20), (9, 1, 4)),
    ((8, 256, 20, 20), (13, 1, 6)),
    ((8, 512, 7, 7), (7, 7, 0)),
]


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


def save(path: str | None, content: dict) -> None:
    """Writes the numbers to a JSON file, where the user named one."""
    from mmsoftpool.files import write_atomically

    if path:
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
        print(f"wrote {path}")


def run_op(args) -> list[dict]:
    from mmsoftpool.analysis import benchmark

    rows = []
    shapes = OP_CASES
    if args.shape or args.kernel:
        shapes = [(tuple(args.shape or STEM), pooling) for pooling in args.kernel or KERNELS]
    cases = list(itertools.product(args.dtype, args.layout, shapes))
    for i, (dtype, layout, (shape, pooling)) in enumerate(cases):
        title = (
            f"{i + 1}/{len(cases)}: {args.device}, {dtype}, {layout}, {shape}, k, s, p = {pooling}"
        )
        print(f"{title} ...", flush=True)
        case = benchmark.benchmark_pooling(
            args.device, dtype, layout, pooling, shape, args.rounds, names=args.methods or ()
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
    from mmsoftpool.analysis import benchmark, paper

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
    from mmsoftpool.analysis import benchmark

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


def run_sass(args) -> dict:
    from mmsoftpool.analysis import roofline
    from mmsoftpool.files import check_output

    unknown = set(args.arch) - set(roofline.LIMITS)
    if unknown:
        raise ValueError(
            f"arch must be among {', '.join(roofline.LIMITS)}, got {', '.join(sorted(unknown))}"
        )
    given = dict(
        name=args.gpu,
        sms=args.sms,
        clock=args.clock and args.clock * 1e9,
        lanes=args.lanes,
        bandwidth=args.bandwidth and args.bandwidth * 1e12,
    )
    for name, value in given.items():
        if name != "name" and value is not None and not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {getattr(args, name)}")
    if args.json:
        check_output(args.json)
    gpu = roofline.H200._replace(**{k: v for k, v in given.items() if v is not None})
    rows = []
    for arch in args.arch:
        case = roofline.roofline(arch, gpu, args.library)
        print(
            f"Compute capability {arch}. Shares of the copy bandwidth that issue, the exponential "
            f"unit and memory allow on: {gpu.name}, {gpu.sms} SMs at {gpu.clock / 1e9:g} GHz, "
            f"which issue {gpu.lanes} and take {gpu.special} exponentials a clock, "
            f"{gpu.bandwidth / 1e12:g} TB/s\n\n{roofline.table(case)}\n"
        )
        rows += case
    return dict(assumptions=gpu._asdict(), rows=rows)


def make_parser():
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, help="what to measure")
    op = commands.add_parser("op", help="SoftPool's operator and its alternatives")
    pooling = commands.add_parser(
        "pooling", help="the pooling methods of the paper's Table 3, beside its times"
    )
    cases = "; ".join(
        f"{k},{s},{p} of {' '.join(map(str, shape))}" for shape, (k, s, p) in OP_CASES
    )
    for command, layouts, default in (
        (op, ["contiguous", "channels_last"], f"without --kernel and --shape {cases}"),
        (pooling, ["contiguous"], "3,2,1 and 2,2,0 of 8 64 112 112"),
    ):
        command.add_argument(
            "--dtype",
            nargs="+",
            choices=["float32", "float16", "bfloat16"],
            default=["float32"],
            help="the data types of the input (default: float32)",
        )
        command.add_argument(
            "--layout",
            nargs="+",
            choices=["contiguous", "channels_last"],
            default=layouts,
            help=f"the memory formats of the input (default: {' '.join(layouts)})",
        )
        command.add_argument(
            "--kernel",
            nargs="+",
            type=kernel,
            metavar="K,S,P",
            help=f"the poolings, each as kernel_size,stride,padding (default: {default})",
        )
        command.add_argument(
            "--shape",
            nargs=4,
            type=int,
            metavar=("N", "C", "H", "W"),
            help="the shape of the input (default: see --kernel)",
        )
        command.add_argument(
            "--plot", metavar="FILE", help="save a picture of the times to this file"
        )
    op.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="compare these methods, such as soft_pool2d F.max_pool2d; the first is the base of "
        "the ratios (default: all, of which some are ten times slower)",
    )
    # A stem on ImageNet, as in the paper.
    pooling.set_defaults(kernel=KERNELS, shape=[8, 64, 112, 112])
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
    sass = commands.add_parser("sass", help="the CUDA kernels' machine code; needs no GPU")
    sass.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        default=["8.0", "9.0", "10.0", "12.0"],
        help="the compute capabilities to compile for (default: 8.0 9.0 10.0 12.0)",
    )
    sass.add_argument(
        "--library", metavar="FILE", help="take the code of this built library; do not compile"
    )
    sass.add_argument("--gpu", metavar="NAME", help="the name of the GPU (default: H200)")
    for option, kind, text in (
        ("--sms", int, "the number of streaming multiprocessors (default: the H200's 132)"),
        ("--clock", float, "their clock in GHz (default: 1.9)"),
        ("--lanes", int, "the lanes of an SM that issue in a clock (default: 128)"),
        ("--bandwidth", float, "the bandwidth of a copy in TB/s (default: 4.2)"),
    ):
        sass.add_argument(option, type=kind, metavar="N", help=text)
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
    for command in (op, pooling, model, sass):
        command.add_argument("--json", metavar="FILE", help="save all numbers to this JSON file")
    return parser


def main(args):
    if args.command == "sass":
        return save(args.json, run_sass(args))

    if args.capability:
        os.environ["ATEN_CPU_CAPABILITY"] = args.capability  # read with the libraries
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # else torch's profiler prints between the tables
    import torch

    from mmsoftpool.analysis import benchmark
    from mmsoftpool.files import check_output
    from mmsoftpool.ops import backends
    from mmsoftpool.visualization import check_picture

    if args.capability not in (None, backends.cpu_capability()):
        raise ValueError(
            f"capability must be one that this machine has, such as {backends.cpu_capability()}, "
            f"got {args.capability}"
        )
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu, because torch finds no GPU, got cuda")
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise ValueError(f"threads must be from 1 to 1024, got {args.threads}")
    if args.json:
        check_output(args.json)
    if args.command != "model" and args.plot:
        check_picture(args.plot)
    if args.threads:
        torch.set_num_threads(args.threads)
    run = {"op": run_op, "pooling": run_pooling, "model": run_model}[args.command]
    rows = run(args)
    save(args.json, dict(environment=benchmark.environment(args.device), rows=rows))
    if args.command != "model" and args.plot:
        benchmark.plot(rows, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    cli.run(main, make_parser())
