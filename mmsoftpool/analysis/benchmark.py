"""Time and memory of pooling methods, and of whole detectors, side by side in one run.

The methods take turns in every round, so that noise of the machine affects all of them alike;
results are medians over the rounds, and their ratios.
"""

import gc
import importlib.util
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import reference, soft_pool2d
from ..ops.pooling import Pooling
from ..visualization import save_figure

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

    from ..models.pooling_methods import METHODS

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
    from .. import __version__
    from ..ops import backends

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


def _check_counts(**arguments: Sequence[int]) -> None:
    for name, numbers in arguments.items():
        if min(numbers) < 1:
            raise ValueError(f"{name} must be at least 1, got {', '.join(map(str, numbers))}")


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
        ValueError: If an argument is something else, or no method can pool this input.
    """
    for name, value, allowed in (
        ("compare", compare, ("operators", "methods")),
        ("dtype", dtype, DTYPES),
        ("layout", layout, LAYOUTS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    _check_counts(shape=shape, rounds=(rounds,))
    Pooling.check(2, *pooling)
    try:
        x = torch.randn(shape, device=device).to(DTYPES[dtype])
    except (TypeError, RuntimeError) as error:  # beyond 64 bits, beyond the memory
        raise ValueError(f"shape must fit into the memory, got {tuple(shape)}") from error
    x = x.contiguous(memory_format=LAYOUTS[layout])
    target = torch.empty_like(x)
    leaf = x.clone().requires_grad_()
    case = dict(device=device, dtype=dtype, layout=layout, shape=list(shape), pooling=list(pooling))
    rows, forward, backward, both = {}, {}, {}, {}
    compared = methods(pooling, device) if compare == "methods" else operators(pooling)
    if unknown := set(names) - compared.keys():
        raise ValueError(f"names must be among {', '.join(compared)}, got {', '.join(unknown)}")
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
        raise ValueError(
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
        ValueError: If a size or number is below 1, or a config is wrong.
        FileNotFoundError: If a config is missing.
    """
    from mmdet.testing import demo_mm_inputs
    from mmengine.logging import MessageHub

    from ..engine import build_model, build_optimizer, load_config, require

    _check_counts(size=size, batch_size=(batch_size,), rounds=(rounds,))
    train, inference, rows = {}, {}, []
    # YOLOX's training asks for the iteration, to draw the size of the images.
    MessageHub.get_current_instance().update_info("iter", 0)
    for path in configs:
        cfg = load_config(path)
        require(cfg, "model.backbone", "optim_wrapper")
        cfg.model.backbone.pop("init_cfg", None)
        model = build_model(cfg).to(device)
        optim = build_optimizer(cfg, model)
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


def plot(rows: list[dict], path) -> None:
    """Draws forward and backward times as bars, one panel per case.

    Args:
        rows: From :func:`benchmark_pooling`, of one or more cases.
        path (str | Path): Picture file.
    """
    from matplotlib.figure import Figure  # here, so that the rest needs torch alone

    cases = {}
    for row in rows:
        if "backward" in row:
            title = "{device} {dtype}\n{layout}\nk, s, p = {pooling}".format(**row)
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
        axes.set(xlabel="ms (log)", xscale="log")
        axes.invert_yaxis()
    panels[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)
