#!/usr/bin/env python
"""Measures the time and memory of SoftPool's operator, of the paper's pooling methods, of
detectors or of exported files, side by side in one run; or predicts the operator's time on a GPU
from the machine code.

The methods take turns in every round, so that noise of the machine affects all of them alike;
results are medians over the rounds, and their ratios.

Examples:
  python benchmarks/benchmark.py op
  python benchmarks/benchmark.py op --dtype float32 --kernel 3,2,1 --json op.json --plot op.png
  python benchmarks/benchmark.py op --methods soft_pool2d F.avg_pool2d F.max_pool2d
  python benchmarks/benchmark.py pooling --kernel 2,2,0
  python benchmarks/benchmark.py model configs/retinanet_r50_softpool.py --size 800 1344
  python benchmarks/benchmark.py deploy --threads 2 --json deploy.json
  python benchmarks/benchmark.py sass --arch 9.0 8.0 --json sass.json
"""

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["KINETO_LOG_LEVEL"] = "99"  # else torch's profiler prints between the tables

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmsoftpool
import roofline
from mmsoftpool import cli
from mmsoftpool.errors import UserError
from mmsoftpool.files import check_output, write_atomically
from mmsoftpool.ops import backends, reference, soft_pool2d
from mmsoftpool.ops.pooling import Pooling
from mmsoftpool.pictures import check_picture, save_figure

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
#: Table 3 of the paper: milliseconds (forward, backward) on the CPU and on CUDA.
PAPER = {
    "average": dict(cpu=(9, 49), cuda=(14, 76)),
    "maximum": dict(cpu=(91, 152), cuda=(195, 267)),
    "power-average": dict(cpu=(74, 329), cuda=(120, 433)),
    "sum": dict(cpu=(26, 163), cuda=(79, 323)),
    "lp": dict(cpu=(116, 338), cuda=(214, 422)),
    "gate": dict(cpu=(245, 339), cuda=(327, 540)),
    "lite-s3dpp": dict(cpu=(427, 860), cuda=(634, 1228)),
    "lip": dict(cpu=(134, 257), cuda=(258, 362)),
    "stochastic": dict(cpu=(162, 341), cuda=(219, 485)),
    "s3": dict(cpu=(233, 410), cuda=(345, 486)),
    "softpool": dict(cpu=(31, 156), cuda=(56, 234)),
}
# What `deploy` measures: pools with the input that a detector has there, and networks as a config's
# name, the exported part and the image size.
DEPLOYED_POOLS = [
    ((1, 64, 400, 608), (3, 2, 1)),
    ((1, 256, 40, 40), (5, 1, 2)),
    ((1, 256, 20, 20), (13, 1, 6)),
]
DEPLOYED_NETWORKS = {
    "ResNet-50": ("retinanet_r50", True, (800, 1216)),
    "YOLOX-s": ("yolox_s", False, (640, 640)),
}
#: Of the inputs of a pool: as activations are, and so large that the file takes its exact form.
DEPLOYED_SCALES = {"fast": 1.0, "exact": 1000.0}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def exp_and_two_avg_pools(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """SoftPool as avg(x e^x) / avg(e^x), which overflows for large inputs."""
    e = x.exp()
    return F.avg_pool2d(x * e, kernel_size, stride, padding) / F.avg_pool2d(
        e, kernel_size, stride, padding
    )


def unfold_softmax(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """SoftPool by unfolding every window; the padding's zeros have weight."""
    n, c = x.shape[:2]
    size = [(s + 2 * padding - kernel_size) // stride + 1 for s in x.shape[2:]]
    taps = F.unfold(x, kernel_size, padding=padding, stride=stride).view(n, c, kernel_size**2, -1)
    return (taps.softmax(2) * taps).sum(2).view(n, c, *size)


def _reference(x, kernel_size, stride, padding):
    return reference.soft_pool(x, *Pooling.check(2, kernel_size, stride, padding))


def operators(pooling: tuple[int, int, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """SoftPool's operator and its alternatives, as functions of the input."""
    functions = {
        "soft_pool2d": soft_pool2d,
        "F.avg_pool2d": F.avg_pool2d,
        "F.max_pool2d": F.max_pool2d,
        "exp and two avg pools": exp_and_two_avg_pools,
        "unfold and softmax": unfold_softmax,
        "torch.compile(reference)": torch.compile(_reference, dynamic=False),
    }
    if importlib.util.find_spec("SoftPool") is not None:  # the authors' package
        theirs = importlib.import_module("SoftPool").soft_pool2d
        functions["authors' soft_pool2d"] = lambda x, k, s, p: theirs(x, k, s)  # has no padding
    return {
        name: lambda x, function=function: function(x, *pooling)
        for name, function in functions.items()
    }


def methods(pooling: tuple[int, int, int], device: str) -> dict[str, nn.Module]:
    """The pooling methods of the paper's Table 3 as modules, in training mode."""
    from mmengine.registry import MODELS

    sys.path.append(str(Path(__file__).parent.parent / "paper"))
    from pooling_methods import METHODS

    grid = dict(zip(("kernel_size", "stride", "padding"), pooling, strict=True))
    return {name: MODELS.build({**cfg, **grid}).to(device) for name, cfg in METHODS.items()}


def medians(
    functions: dict[str, Callable[..., object]],
    device: str,
    rounds: int = 15,
    prepare: Callable[[str], tuple] = lambda name: (),
) -> dict[str, float]:
    """Median time of each function in seconds, by device events on CUDA.

    The functions take turns, in an order that changes from round to round. A call of the same
    function precedes each timed one, so that caches and freed memory are its own.

    Args:
        functions: The functions by name.
        device: ``'cpu'`` or ``'cuda'``.
        rounds: Number of timed calls of each function. Defaults to 15.
        prepare: Returns a function's arguments, before every call and not timed. Defaults to none.
    """
    times = {name: [] for name in functions}
    for i in range(rounds):
        for name, function in random.Random(i).sample(list(functions.items()), len(functions)):
            function(*prepare(name))
            arguments = prepare(name)
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function(*arguments)
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                begin = time.perf_counter()
                function(*arguments)
                seconds = time.perf_counter() - begin
            times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Peak size in bytes of the tensors that ``function`` allocates."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def environment(device: str) -> dict[str, object]:
    """Device, versions and threads, which the results depend on."""
    return dict(
        device=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        compiled=backends.load(device).path is not None,
        threads=torch.get_num_threads(),
        cpu_capability=backends.cpu_capability(),
        torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
        # They decide whether an output has new memory, which costs page faults.
        allocator={name: os.environ.get(name, "") for name in ("GLIBC_TUNABLES", "LD_PRELOAD")},
        torch=torch.__version__,
        cuda=torch.version.cuda,
        mmsoftpool=mmsoftpool.__version__,
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(
                line.split(":")[1].strip() for line in info if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor()


def _check_counts(**arguments: Sequence[int]) -> None:
    for name, numbers in arguments.items():
        if min(numbers) < 1:
            raise UserError(f"{name} must be at least 1, got {', '.join(map(str, numbers))}")


def benchmark_pooling(
    device: str,
    dtype: str,
    layout: str,
    pooling: tuple[int, int, int],
    shape: tuple[int, int, int, int] = (4, 64, 400, 672),
    rounds: int = 15,
    compare: str = "operators",
    names: Sequence[str] = (),
) -> list[dict]:
    """Measures every method's forward, backward and both together on one input.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        dtype: A key of :data:`DTYPES`.
        layout: A key of :data:`LAYOUTS`.
        pooling: kernel_size, stride and padding.
        shape: Shape of the input. Defaults to the stem of a ResNet at 800 x 1344.
        rounds: Rounds of the medians. Defaults to 15.
        compare: ``'operators'``, see :func:`operators`, or ``'methods'``, see :func:`methods`; the
            backward of a trainable method includes its parameters' gradients. Defaults to
            ``'operators'``.
        names: The methods among these, by name. Defaults to all.

    Returns:
        A row per method: median times in seconds, peak memory in bytes, ``*_bandwidth`` in bytes
        per second with every tensor counted once, and ``*_bandwidth_of_copy`` relative to a copy of
        the input. The first row is the copy; a method that fails has its message in ``error``.

    Raises:
        UserError: If an argument is something else, or no method can pool this input.
    """
    for name, value, allowed in (
        ("compare", compare, ("operators", "methods")),
        ("dtype", dtype, DTYPES),
        ("layout", layout, LAYOUTS),
    ):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    _check_counts(shape=shape, rounds=(rounds,))
    try:
        Pooling.check(2, *pooling)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        x = torch.randn(shape, device=device).to(DTYPES[dtype])
    except (TypeError, RuntimeError) as error:  # beyond 64 bits, beyond the memory
        raise UserError(f"shape must fit into the memory, got {tuple(shape)}") from error
    x = x.contiguous(memory_format=LAYOUTS[layout])
    target = torch.empty_like(x)
    leaf = x.clone().requires_grad_()
    case = dict(device=device, dtype=dtype, layout=layout, shape=list(shape), pooling=list(pooling))
    rows, forward, backward, both = {}, {}, {}, {}
    compared = methods(pooling, device) if compare == "methods" else operators(pooling)
    if unknown := set(names) - compared.keys():
        raise UserError(f"names must be among {', '.join(compared)}, got {', '.join(unknown)}")
    if names:
        compared = {name: compared[name] for name in names}
    for name, method in compared.items():
        rows[name] = dict(case, method=name)
        leaves = [leaf, *(method.parameters() if isinstance(method, nn.Module) else ())]
        try:
            y = method(leaf)
            grad = torch.ones_like(y)
            torch.autograd.grad(y, leaves, grad)
        except Exception as error:  # such as a dtype that one of the others does not support
            rows[name]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue

        def run_forward(method=method):
            with torch.no_grad():
                return method(x)

        def run_backward(y, leaves=leaves, grad=grad):
            return torch.autograd.grad(y, leaves, grad)

        def run_both(method=method, run_backward=run_backward):
            return run_backward(method(leaf))

        forward[name], backward[name], both[name] = run_forward, run_backward, run_both
        rows[name]["forward_memory"] = peak_memory(run_forward, device)
        rows[name]["both_memory"] = peak_memory(run_both, device)
    if not forward:
        raise UserError(
            f"pooling {tuple(pooling)} must fit the shape {tuple(shape)}, got "
            f"{next(iter(rows.values()))['error']}"
        )
    forward["copy"] = lambda: target.copy_(x)
    times = {
        "forward": medians(forward, device, rounds),
        "backward": medians(backward, device, rounds, prepare=lambda name: (compared[name](leaf),)),
        "both": medians(both, device, rounds),
    }
    size, out_size = x.nbytes, y.nbytes
    copy = 2 * size / times["forward"]["copy"]
    result = [dict(case, method="copy", forward=times["forward"]["copy"], forward_bandwidth=copy)]
    for name, row in rows.items():
        if "error" not in row:
            for part, total in (("forward", size + out_size), ("backward", 2 * size + out_size)):
                row[f"{part}_bandwidth"] = total / times[part][name]
                row[f"{part}_bandwidth_of_copy"] = total / times[part][name] / copy
            row.update({part: times[part][name] for part in times})
        result.append(row)
    return result


def benchmark_models(
    configs: list[str],
    device: str,
    size: tuple[int, int] = (800, 1344),
    batch_size: int = 2,
    rounds: int = 10,
) -> list[dict]:
    """Measures whole detectors, with random weights on random images.

    Args:
        configs: Config files.
        device: ``'cpu'`` or ``'cuda'``.
        size: Height and width of the images. Defaults to (800, 1344).
        batch_size: Images of an iteration. Defaults to 2.
        rounds: Rounds of the medians. Defaults to 10.

    Returns:
        A row per config: ``train``, the time of a training iteration with the optimiser's step, and
        ``inference``, the time of a batch, in seconds; ``train_memory`` and ``inference_memory``,
        the peak in bytes beyond the weights.

    Raises:
        UserError: If a size or number is below 1, or a config is wrong.
        FileNotFoundError: If a config is missing.
    """
    from mmdet.testing import demo_mm_inputs
    from mmengine.logging import MessageHub
    from mmengine.optim import build_optim_wrapper

    from mmsoftpool.config import load_config, require
    from mmsoftpool.runner import build_model

    _check_counts(size=size, batch_size=(batch_size,), rounds=(rounds,))
    train, inference, rows = {}, {}, []
    # YOLOX's training asks for the iteration, to draw the size of the images.
    MessageHub.get_current_instance().update_info("iter", 0)
    for path in configs:
        cfg = load_config(path)
        require(cfg, "optim_wrapper")
        model = build_model(cfg).to(device)
        optim = build_optim_wrapper(model, cfg.optim_wrapper)
        inputs = demo_mm_inputs(
            batch_size,
            image_shapes=[(3, *size)] * batch_size,
            num_classes=2,  # the label is 1, which every detector with two classes or more has
            with_mask=getattr(model, "with_mask", False),
            device=device,
        )

        def test_step(model=model, inputs=inputs):
            model.eval()
            with torch.no_grad():
                model.test_step(inputs)

        def train_step(model=model, optim=optim, inputs=inputs):
            model.train()
            model.train_step(inputs, optim)

        train[path], inference[path] = train_step, test_step
        rows.append(
            dict(
                config=path,
                train_memory=peak_memory(train_step, device),
                inference_memory=peak_memory(test_step, device),
            )
        )
    train_times = medians(train, device, rounds)
    inference_times = medians(inference, device, rounds)
    for row in rows:
        row.update(train=train_times[row["config"]], inference=inference_times[row["config"]])
    return rows


def onnxruntime_session(path: str, threads: int) -> Callable[..., list]:
    """An ONNX file in ONNX Runtime, on the CPU, as a function of a NumPy array."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it names every constant that is not used
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def openvino_session(path: str, threads: int) -> Callable[..., list]:
    """An ONNX file in OpenVINO, on the CPU and in float32, as a function of a NumPy array."""
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda image: list(
        request.infer({0: image}, share_inputs=True, share_outputs=True).values()
    )


#: Inference engines by the names of their packages.
ENGINES = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}


def export_pool(pool: nn.Module, shape: Sequence[int], path: str) -> None:
    """Writes a pool as an ONNX file with dynamic batch and image size."""
    dynamic = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        pool,
        (torch.randn(*shape),),
        path,
        dynamo=True,
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        external_data=False,
        verbose=False,
    )


def export_detector(config: str, backbone: bool, path: str) -> nn.Module:
    """Writes a detector with random weights as ``mmsoftpool export`` does; returns its network."""
    from mmsoftpool import export
    from mmsoftpool.config import load_config
    from mmsoftpool.runner import build_model

    cfg = load_config(config)
    torch.manual_seed(0)
    network = export.Network(build_model(cfg), backbone).eval()
    export.export(network, "onnx", path)
    return network


def benchmark_deploy(
    case: str,
    networks: dict[str, nn.Module],
    folder: str,
    images: dict[str, Tensor],
    engines: Sequence[str] = tuple(ENGINES),
    threads: int = 2,
    rounds: int = 15,
) -> list[dict]:
    """Measures exported networks in inference engines; they take turns.

    Args:
        case: The name of the case.
        networks: The network with max pooling as ``"max"`` and its twin as ``"soft"``, in eval
            mode; each is in ``folder`` as an ONNX file of that name.
        folder: Where the files are.
        images: Inputs by a name.
        engines: Keys of :data:`ENGINES`. Defaults to all.
        threads: CPU threads of an engine. Defaults to 2.
        rounds: Rounds of the medians. Defaults to 15.

    Returns:
        A row per image and engine: ``max`` and ``soft``, the median times in seconds; ``ratio``,
        soft / max; ``difference``, the largest one of an output of ``soft`` from PyTorch, relative
        to the largest value of that output.
    """
    sessions = {
        (engine, name): ENGINES[engine](f"{folder}/{name}.onnx", threads)
        for engine in engines
        for name in networks
    }
    rows = []
    for form, image in images.items():
        with torch.no_grad():
            expected = networks["soft"](image)
        expected = [expected] if isinstance(expected, Tensor) else expected
        run = {key: functools.partial(session, image.numpy()) for key, session in sessions.items()}
        times = medians(run, "cpu", rounds)
        for engine in engines:
            outputs = run[engine, "soft"]()
            difference = max(
                ((torch.from_numpy(got) - want).abs().max() / want.abs().max()).item()
                for got, want in zip(outputs, expected, strict=True)
            )
            row = dict(case=case, input=form, engine=engine, difference=difference)
            row.update({name: times[engine, name] for name in networks})
            rows.append(row | dict(ratio=row["soft"] / row["max"]))
    return rows


def plot(rows: list[dict], path) -> None:
    """Draws forward and backward times as bars, one panel per case.

    Args:
        rows: From :func:`benchmark_pooling`, of one or more cases.
        path (str | Path): Picture file.
    """
    from matplotlib.figure import Figure  # here: the rest requires only torch

    cases = {}
    for row in rows:
        if "backward" in row:
            k, s, p = row["pooling"]
            title = "{device} {dtype} {shape}\n{layout}".format(**row) + f", k{k} s{s} p{p}"
            cases.setdefault(title, []).append(row)
    figure = Figure((3.4 * len(cases) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, (title, case) in zip(panels, cases.items(), strict=True):
        names = [row["method"] for row in case]
        for part, left, colour in (("forward", 0.0, "tab:blue"), ("backward", 0.4, "tab:orange")):
            heights = [row[part] * 1e3 for row in case]
            axes.barh([i + left for i in range(len(case))], heights, 0.38, label=part, color=colour)
        axes.set_yticks([i + 0.2 for i in range(len(case))], names if axes is panels[0] else [])
        axes.set_title(title, fontsize=8)
        axes.set(xlabel="ms")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


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
            elif part == "ratio":
                cells.append(f"{value:.2f}")
            elif part == "difference":
                cells.append(f"{value:.0e}")
            else:
                cells.append(f"{value * 1e3:.2f}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    Console(width=None if os.isatty(1) else 160).print(table)


def save(path: str | None, content: dict) -> None:
    """Writes the numbers to a JSON file, where the user named one."""
    if path:
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
        print(f"wrote {path}")


def run_op(args) -> list[dict]:
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
        case = benchmark_pooling(
            args.device, dtype, layout, pooling, shape, args.rounds, names=args.methods or ()
        )
        base = f"/ {case[1]['method']}"
        columns = {
            "method": "method",
            "forward": "fwd ms",
            "forward/ratio": base,
            "backward": "bwd ms",
            "backward/ratio": base,
            "both": "both ms",
            "both/ratio": base,
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
        case = benchmark_pooling(
            args.device, dtype, layout, pooling, tuple(args.shape), args.rounds, "methods"
        )[1:]  # without the copy
        for row in case:
            forward, backward = PAPER[row["method"]][args.device]
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
    rows = benchmark_models(
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


def run_deploy(args) -> list[dict]:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every step
    warnings.simplefilter("ignore")
    rows = []

    def measure(case, networks, folder, images):
        rounds = args.rounds if case in DEPLOYED_NETWORKS else 3 * args.rounds
        part = benchmark_deploy(
            case, networks, folder, images, args.engines, torch.get_num_threads(), rounds
        )
        columns = {
            "input": "form",
            "engine": "engine",
            "max": "max ms",
            "soft": "soft ms",
            "ratio": "soft / max",
            "difference": "difference",
        }
        show(case, part, columns, base={})
        rows.extend(part)

    for shape, (k, s, p) in DEPLOYED_POOLS:
        networks = {"max": nn.MaxPool2d(k, s, p), "soft": mmsoftpool.SoftPool2d(k, s, p)}
        images = {name: scale * torch.randn(shape) for name, scale in DEPLOYED_SCALES.items()}
        with tempfile.TemporaryDirectory() as folder:
            for name, pool in networks.items():
                export_pool(pool, shape, f"{folder}/{name}.onnx")
            measure(f"k{k} s{s} p{p} of {shape}", networks, folder, images)
    for case, (config, backbone, size) in DEPLOYED_NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            networks = {
                name: export_detector(f"{config}_{name}pool", backbone, f"{folder}/{name}.onnx")
                for name in ("max", "soft")
            }
            measure(case, networks, folder, {"fast": torch.randn(1, 3, *size)})
    return rows


def run_sass(args) -> dict:
    given = dict(
        name=args.gpu,
        sms=args.sms,
        clock=args.clock and args.clock * 1e9,
        lanes=args.lanes,
        bandwidth=args.bandwidth and args.bandwidth * 1e12,
    )
    for name, value in given.items():
        if name != "name" and value is not None and not value > 0:
            raise UserError(f"{name} must be greater than 0, got {getattr(args, name)}")
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
        (op, list(LAYOUTS), f"without --kernel and --shape {cases}"),
        (pooling, ["contiguous"], "3,2,1 and 2,2,0 of 8 64 112 112"),
    ):
        command.add_argument(
            "--dtype",
            nargs="+",
            choices=list(DTYPES),
            default=["float32"],
            help="the data types of the input (default: float32)",
        )
        command.add_argument(
            "--layout",
            nargs="+",
            choices=list(LAYOUTS),
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
    deploy = commands.add_parser(
        "deploy", help="exported ONNX files in inference engines, on the CPU; takes 8 minutes"
    )
    deploy.add_argument(
        "--engines",
        nargs="+",
        choices=list(ENGINES),
        default=list(ENGINES),
        help=f"the engines (default: {' '.join(ENGINES)})",
    )
    deploy.set_defaults(device="cpu", capability=None)
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
    for command, rounds in ((op, 15), (pooling, 15), (model, 15), (deploy, 5)):
        command.add_argument(
            "--threads",
            type=int,
            metavar="N",
            help="the number of CPU threads (default: torch's default)",
        )
        command.add_argument(
            "--rounds",
            type=int,
            default=rounds,
            metavar="N",
            help="the number of rounds; the results are medians over them (default: %(default)s)",
        )
    for command in (op, pooling, model, deploy, sass):
        command.add_argument("--json", metavar="FILE", help="save all numbers to this JSON file")
    return parser


def main(args):
    if args.command == "sass":
        return save(args.json, run_sass(args))

    if args.capability not in (None, os.environ.get("ATEN_CPU_CAPABILITY")):
        # The libraries have read the variable when they were imported: start again with it.
        os.environ["ATEN_CPU_CAPABILITY"] = args.capability
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if args.capability not in (None, backends.cpu_capability()):
        raise UserError(
            f"capability must be one that this machine has, such as {backends.cpu_capability()}, "
            f"got {args.capability}"
        )
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device must be cpu, because torch finds no GPU, got cuda")
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise UserError(f"threads must be from 1 to 1024, got {args.threads}")
    if args.json:
        check_output(args.json)
    if plotted := args.command in ("op", "pooling") and args.plot:
        check_picture(args.plot)
    if args.threads:
        torch.set_num_threads(args.threads)
    used = environment(args.device)
    if args.command == "deploy":
        used |= {name: importlib.metadata.version(name) for name in ("onnx", *args.engines)}
    run = {"op": run_op, "pooling": run_pooling, "model": run_model, "deploy": run_deploy}
    rows = run[args.command](args)
    save(args.json, dict(environment=used, rows=rows))
    if plotted:
        plot(rows, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
