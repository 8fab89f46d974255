"""Time and memory of pooling methods, and of whole detectors, side by side in one run.

Methods take turns, round after round, so that a noisy machine is noisy for all of them; what is
reported are medians over the rounds, and ratios.
"""

import gc
import importlib.util
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import reference, soft_pool2d
from ..ops.pooling import Pooling

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def exp_and_two_avg_pools(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """SoftPool as avg(x e^x) / avg(e^x): the usual few lines of PyTorch, which overflow."""
    e = x.exp()
    return F.avg_pool2d(x * e, kernel_size, stride, padding) / F.avg_pool2d(
        e, kernel_size, stride, padding
    )


def unfold_softmax(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """SoftPool by unfolding every window; zeros from the padding take part."""
    n, c = x.shape[:2]
    size = [(s + 2 * padding - kernel_size) // stride + 1 for s in x.shape[2:]]
    taps = F.unfold(x, kernel_size, padding=padding, stride=stride).view(n, c, kernel_size**2, -1)
    return (taps.softmax(2) * taps).sum(2).view(n, c, *size)


def _reference(x, kernel_size, stride, padding):
    return reference.soft_pool(x, *Pooling.check(2, kernel_size, stride, padding))


def operators(pooling: tuple[int, int, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """SoftPool's operator and what can stand in for it, as functions of the input."""
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


def methods(
    pooling: tuple[int, int, int], channels: int, device: str
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The pooling methods of the paper's Table 3 as modules, in training mode."""
    from mmengine.registry import MODELS

    from ..models.pooling_methods import METHODS

    kernel_size, stride, padding = pooling
    modules = {}
    for name, cfg in METHODS.items():
        cfg = dict(cfg, kernel_size=kernel_size, stride=stride, padding=padding)
        if name in ("lp", "lite-s3dpp", "lip"):
            cfg["channels"] = channels
        modules[name] = MODELS.build(cfg).to(device)
    return modules


#: Milliseconds on the CPU and on CUDA, each forward and backward, from Table 3 of the paper.
PAPER_LATENCY = {
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


def medians(
    functions: dict[str, Callable[[], object]], device: str, rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median time of each function in seconds, taking turns; by device events on CUDA.

    The order changes from round to round: what ran before, and the memory that it gave back, is
    not always the same function's burden.
    """
    times = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in random.Random(i).sample(list(functions.items()), len(functions)):
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                begin = time.perf_counter()
                function()
                seconds = time.perf_counter() - begin
            if i >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], object], device: str) -> int:
    """The most bytes that tensors made by ``function`` held at a time."""
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
    """What a number depends on: machine, versions, threads."""
    from .. import __version__
    from ..ops import backends

    return dict(
        device=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        compiled=backends.load(device).path is not None,
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        mmsoftpool=__version__,
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(
                line.split(":")[1].strip() for line in info if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor()


def benchmark_pooling(
    device: str,
    dtype: str,
    layout: str,
    pooling: tuple[int, int, int],
    shape: tuple[int, int, int, int] = (4, 64, 400, 672),
    rounds: int = 15,
    compare: str = "operators",
) -> list[dict]:
    """Times every method on one input, forward, backward and both.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        dtype: A key of :data:`DTYPES`.
        layout: A key of :data:`LAYOUTS`.
        pooling: kernel_size, stride and padding.
        shape: Shape of the input. Defaults to the stem of a ResNet at 800 x 1344.
        rounds: Rounds that the medians are taken over. Defaults to 15.
        compare: ``'operators'``, see :func:`operators`, or ``'methods'``, see :func:`methods`; the
            backward of a trainable method gives its parameters' gradients too. Defaults to
            ``'operators'``.

    Returns:
        A row per method: times in seconds, peak memory in bytes, ``*_bandwidth`` in bytes per
        second counting every tensor once, and the same as a share of a copy's. The first row is
        the copy; a method that fails has its message under ``error``.
    """
    functorch_config.donated_buffer = False  # a compiled backward is run several times
    x = torch.randn(shape, device=device).to(DTYPES[dtype])
    x = x.contiguous(memory_format=LAYOUTS[layout])
    target = torch.empty_like(x)
    leaf = x.clone().requires_grad_()
    case = dict(device=device, dtype=dtype, layout=layout, pooling=list(pooling))
    rows, forward, backward, both = {}, {}, {}, {}
    by_methods = compare == "methods"
    compared = methods(pooling, shape[1], device) if by_methods else operators(pooling)
    for name, method in compared.items():
        rows[name] = dict(case, method=name)
        leaves = [leaf, *(method.parameters() if isinstance(method, nn.Module) else ())]
        try:
            y = method(leaf)
            grad = torch.ones_like(y)
            torch.autograd.grad(y, leaves, grad, retain_graph=True)
        except Exception as error:  # a rival that does not take this dtype must not end the run
            rows[name]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue

        def run(method=method, leaves=leaves, grad=grad):
            return torch.autograd.grad(method(leaf), leaves, grad)

        def run_forward(method=method):
            with torch.no_grad():
                return method(x)

        forward[name] = run_forward
        backward[name] = lambda y=y, leaves=leaves, grad=grad: torch.autograd.grad(
            y, leaves, grad, retain_graph=True
        )
        both[name] = run
        rows[name]["forward_memory"] = peak_memory(forward[name], device)
        rows[name]["both_memory"] = peak_memory(run, device)
    forward["copy"] = lambda: target.copy_(x)
    times = {
        "forward": medians(forward, device, rounds),
        "backward": medians(backward, device, rounds),
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
    """Times whole detectors, with random weights on random images.

    Args:
        configs: Config files.
        device: ``'cpu'`` or ``'cuda'``.
        size: Height and width of the images. Defaults to (800, 1344).
        batch_size: Images of an iteration. Defaults to 2.
        rounds: Rounds that the medians are taken over. Defaults to 10.

    Returns:
        A row per config: ``train``, the time of a training iteration with the optimiser's step,
        and ``inference``, that of a batch, in seconds; ``train_memory`` and ``inference_memory``,
        the peak in bytes beyond the weights.
    """
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope

    from ..engine import load_config

    train, inference, rows = {}, {}, []
    init_default_scope("mmdet")
    for path in configs:
        cfg = load_config(path)
        cfg.model.backbone.init_cfg = None
        model = MODELS.build(cfg.model).to(device)
        optim = build_optim_wrapper(model, cfg.optim_wrapper)
        inputs = demo_mm_inputs(
            batch_size,
            image_shapes=[(3, *size)] * batch_size,
            num_classes=2,  # the label is 1, which all but one-class detectors have
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
    train_times = medians(train, device, rounds, warmup=1)
    inference_times = medians(inference, device, rounds, warmup=1)
    for row in rows:
        row.update(train=train_times[row["config"]], inference=inference_times[row["config"]])
    return rows
