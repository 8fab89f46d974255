"""The pooling methods that the SoftPool paper compares with (Tables 1, 3 and 5), in plain PyTorch.

Every module takes the geometry of :func:`~mmsoftpool.soft_pool2d` and has the output sizes of
``F.max_pool2d``. Padded taps are absent, also from counts and averages. A window without any tap,
which dilation makes possible, gives 0 (S3Pool, a max pool: -inf). float16 and bfloat16 are computed
in float32. Most modules allocate one copy of the input per tap of the window. The formulas are
those of each method's own paper, which its docstring names; average and max pooling are torch's.

The import registers the modules in the scope ``mmsoftpool``. A config imports them from a checkout,
with ``PYTHONPATH=paper``: ``custom_imports = dict(imports=['mmsoftpool', 'pooling_methods'])``.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsoftpool.ops.pooling import Ints, Padding, Pooling, check_input
from mmsoftpool.ops.reference import Windows, compute_dtype
from mmsoftpool.registry import MODELS


class _Pool2d(nn.Module):
    """Base class: arguments and their checks, unbatched input, dtypes."""

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
    ):
        super().__init__()
        self._pooling = Pooling.check(2, kernel_size, stride, padding, dilation, ceil_mode)
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode

    def _check_input(self, input: Tensor) -> None:
        arguments = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        check_input(2, input, *arguments)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        x = input.to(compute_dtype(input.dtype))
        x = self.pool(x.unsqueeze(0)).squeeze(0) if x.dim() == 3 else self.pool(x)
        return x.to(input.dtype)

    def pool(self, x: Tensor) -> Tensor:
        """Pools (N, C, H, W) to (N, C, H_out, W_out), float32 or float64."""
        raise NotImplementedError

    def windows(self, x: Tensor) -> Windows:
        return Windows(x.shape[2:], self._pooling)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class _PerChannelPool2d(_Pool2d):
    """Base class of pools with parameters per channel.

    With ``channels=None`` the first forward sets the number of channels. Until then the parameters
    are uninitialised, as in torch's lazy modules: an optimizer can hold them, a checkpoint can be
    loaded but not saved, and DistributedDataParallel rejects them.
    """

    def __init__(self, *args: Any, channels: int | None = None):
        super().__init__(*args)
        if channels is not None and (not isinstance(channels, int) or channels < 1):
            raise ValueError(f"channels must be an int >= 1 or None, got {channels!r}")
        self.channels = channels
        for name in self.initial_values(1):
            setattr(self, name, nn.UninitializedParameter())
        if channels is not None:
            self._initialize(channels)

    def initial_values(self, channels: int) -> dict[str, Tensor]:
        """The parameters' initial values by name."""
        raise NotImplementedError

    def _initialize(self, channels: int) -> None:
        self.channels = channels
        with torch.no_grad():
            for name, value in self.initial_values(channels).items():
                parameter = getattr(self, name)
                parameter.materialize(value.shape)
                parameter.copy_(value)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        if self.channels is None:
            self._initialize(input.shape[-3])
        elif input.shape[-3] != self.channels:
            raise ValueError(
                f"input must have channels={self.channels} channels, got {tuple(input.shape)}"
            )
        return super().forward(input)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + next(iter(self.initial_values(1)))
        if self.channels is None and key in state_dict:
            self._initialize(len(state_dict[key]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channels={self.channels}"


def _mean(windows: Windows, x: Tensor) -> Tensor:
    """Mean of each window's present taps."""
    count = windows.present(x).sum(0).clamp(min=1)
    return (windows.gather(x, 0.0) / count).sum(0)


def _norm(windows: Windows, x: Tensor, p: float | Tensor, average: bool) -> Tensor:
    """(sum of |x|^p)^(1/p) of each window, or with the mean; the gradient at 0 is 0."""
    taps = windows.gather(x, 0.0).abs()
    # Division by the largest tap keeps the powers between 0 and 1; it cancels in the result.
    top = taps.detach().amax(0)
    zero = top == 0
    total = ((taps / torch.where(zero, 1, top)) ** p).sum(0)
    if average:
        total = total / windows.present(x).sum(0).clamp(min=1)
    return top * torch.where(zero, 1, total) ** (1 / p)


@MODELS.register_module()
class SumPool2d(_Pool2d):
    """Sum of the taps of each window (SoftPool paper, Figure 2c with p = 1).

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.
    """

    def pool(self, x: Tensor) -> Tensor:
        return self.windows(x).gather(x, 0.0).sum(0)


@MODELS.register_module()
class PowerAvgPool2d(_Pool2d):
    """Power-average pooling: the p-norm of each window, y = ``(sum of |x_i|^p)^(1/p)``.

    Bruna et al., "Signal recovery from pooling representations", ICML 2014, section 2; sum pooling
    of ``|x|`` for p = 1, max pooling of ``|x|`` for p to infinity (SoftPool paper, Figure 2c). For
    values >= 0 it is ``F.lp_pool2d``; here negative values count by their absolute value, and the
    gradient of a window of zeros is 0 instead of NaN.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.
        norm_type: p, at least 1. Defaults to 2, as in the examples of torch's ``nn.LPPool2d``; the
            SoftPool paper does not state its p.
    """

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        *,
        norm_type: float = 2.0,
    ):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode)
        if not 1 <= norm_type < math.inf:
            raise ValueError(f"norm_type must be a finite number >= 1, got {norm_type!r}")
        self.norm_type = norm_type

    def pool(self, x: Tensor) -> Tensor:
        return _norm(self.windows(x), x, self.norm_type, average=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm_type={self.norm_type}"


@MODELS.register_module()
class LearnedNormPool2d(_PerChannelPool2d):
    """Learned-norm pooling: y = ``(mean of |x_i|^p)^(1/p)`` with a learned p per channel.

    Gulcehre et al., "Learned-norm pooling for deep feedforward and recurrent neural networks", ECML
    PKDD 2014, section 3, the normalised L_p unit, with p = 1 + log(1 + e^rho) so that p > 1. The
    taps correspond to that unit's projections; its centres c are 0, since all taps of a window are
    alike. p = 1 is average pooling of ``|x|``, p = 2 the root mean square, p to infinity max
    pooling of ``|x|``.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.
        norm_type: Initial p, > 1. Defaults to 2, the mean of the authors' random initialisation.
        channels: Number of channels. Defaults to None, set by the first forward.

    Attributes:
        rho: Parameter of p, (C,).
    """

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        *,
        norm_type: float = 2.0,
        channels: int | None = None,
    ):
        if not 1 < norm_type < math.inf:
            raise ValueError(f"norm_type must be a finite number > 1, got {norm_type!r}")
        self._initial_rho = (norm_type - 1) + math.log(-math.expm1(1 - norm_type))
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode, channels=channels)

    rho: Tensor

    def initial_values(self, channels: int) -> dict[str, Tensor]:
        return dict(rho=torch.full((channels,), self._initial_rho))

    def pool(self, x: Tensor) -> Tensor:
        p = 1 + F.softplus(self.rho.to(x.dtype))
        return _norm(self.windows(x), x, p[:, None, None], average=True)


@MODELS.register_module()
class GatedPool2d(_Pool2d):
    """Gated max-average pooling: y = s(w'x) max(x) + (1 - s(w'x)) mean(x), s the logistic function.

    Lee et al., "Generalizing pooling functions in convolutional neural networks: mixed, gated, and
    tree", AISTATS 2016, section 3.1, with one mask w per layer, as in that paper's comparisons.
    Absent taps add nothing to w'x.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.

    Attributes:
        weight: The mask w, (kH, kW). Initially 0: maximum and mean in equal parts.
    """

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
    ):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode)
        self.weight = nn.Parameter(torch.zeros(self._pooling[0]))

    def pool(self, x: Tensor) -> Tensor:
        windows = self.windows(x)
        mask = self.weight.to(x.dtype).view(-1, 1, 1, 1, 1)
        gate = (mask * windows.gather(x, 0.0)).sum(0).sigmoid()
        largest = windows.gather(x, torch.finfo(x.dtype).min).amax(0)
        largest = torch.where(windows.present(x).sum(0) == 0, 0, largest)
        return gate * largest + (1 - gate) * _mean(windows, x)


@MODELS.register_module()
class LIPool2d(_PerChannelPool2d):
    """Local importance-based pooling (LIP): y = sum of e^(G(x)_i) x_i / sum of e^(G(x)_i).

    Gao et al., "LIP: Local importance-based pooling", ICCV 2019, section 3. The logit module G is
    the one with which the authors replace ResNet's max pool: a 3×3 convolution without bias,
    instance normalisation with scale and shift, and 12 times the logistic function. SoftPool is
    G(x) = x.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.
        coefficient: The largest logit. Defaults to 12, as the authors set it.
        channels: Number of channels. Defaults to None, set by the first forward.

    Attributes:
        weight: Convolution kernel, (C, C, 3, 3). Initially 0, as the authors set it, with which LIP
            is average pooling.
        scale, shift: Of the normalisation, (C,). Initially 1 and 0.
    """

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        *,
        coefficient: float = 12.0,
        channels: int | None = None,
    ):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode, channels=channels)
        self.coefficient = coefficient

    weight: Tensor
    scale: Tensor
    shift: Tensor

    def initial_values(self, channels: int) -> dict[str, Tensor]:
        return dict(
            weight=torch.zeros(channels, channels, 3, 3),
            scale=torch.ones(channels),
            shift=torch.zeros(channels),
        )

    def pool(self, x: Tensor) -> Tensor:
        weight, scale, shift = (p.to(x.dtype) for p in (self.weight, self.scale, self.shift))
        logits = F.conv2d(x, weight, padding=1)
        # Instance normalisation; F.instance_norm rejects maps of a single pixel.
        logits = F.layer_norm(logits, logits.shape[2:])
        logits = torch.addcmul(shift[:, None, None], scale[:, None, None], logits)
        logits = self.coefficient * logits.sigmoid()
        windows = self.windows(x)
        # Not -inf, with which a window without taps would be NaN.
        weights = windows.gather(logits.to(x.dtype), torch.finfo(x.dtype).min).softmax(0)
        return (weights * windows.gather(x, 0.0)).sum(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coefficient={self.coefficient}"


@MODELS.register_module()
class StochasticPool2d(_Pool2d):
    """Stochastic pooling: one tap of each window, drawn with probability p_i = x_i / sum of x.

    Zeiler and Fergus, "Stochastic pooling for regularization of deep convolutional neural
    networks", ICLR 2013: in training the drawn tap, which gets the whole gradient (eq. 4 and 5); in
    evaluation the expectation, sum of p_i x_i (eq. 6). The method is designed for values >= 0. Here
    a negative tap has probability 0, and in a window without a positive tap all are equally likely,
    so that a window of zeros gives 0.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.
    """

    def pool(self, x: Tensor) -> Tensor:
        windows = self.windows(x)
        taps = windows.gather(x, 0.0)
        positive = taps.clamp(min=0)
        likely = torch.where(positive.amax(0) == 0, windows.present(x), positive)
        likely = likely / likely.detach().amax(0).clamp(min=torch.finfo(x.dtype).tiny)
        if self.training:
            # Of exponential random variables with rates p_i, the i-th is the smallest with
            # probability p_i.
            clocks = torch.empty_like(likely).exponential_()
            return taps.gather(0, (likely.detach() / clocks).argmax(0, keepdim=True)).squeeze(0)
        total = likely.sum(0)
        return (likely / torch.where(total == 0, 1, total) * taps).sum(0)


class _SpatialSamplingPool2d(_Pool2d):
    """Base class: pools with stride 1, then samples rows and columns; see ``S3Pool2d``."""

    def _set_grid_size(self, grid_size: Ints | None) -> None:
        stride = self._pooling.stride
        grid = stride if grid_size is None else grid_size
        grid = [grid] * 2 if isinstance(grid, int) else list(grid)
        if len(grid) != 2 or any(g < s or g % s for g, s in zip(grid, stride, strict=True)):
            raise ValueError(
                f"grid_size must be a multiple of stride={tuple(stride)}, an int or 2 of them, "
                f"or None, got {grid_size!r}"
            )
        self.grid_size = grid

    def dense(self, x: Tensor, windows: Windows) -> Tensor:
        """The pooling with stride 1."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        sizes, stride = x.shape[2:], self._pooling.stride
        outs = self._pooling.output_sizes(sizes)
        dense_pooling = self._pooling._replace(stride=(1, 1), ceil_mode=False)
        dense_sizes = dense_pooling.output_sizes(sizes)
        padding = list(dense_pooling.padding)
        for axis in range(2):  # in ceil mode the last window may need more padding
            needed = (outs[axis] - 1) * stride[axis] + 1
            padding[2 * axis + 1] += max(0, needed - dense_sizes[axis])
            dense_sizes[axis] = max(needed, dense_sizes[axis])
        dense = self.dense(x, Windows(sizes, dense_pooling._replace(padding=padding)))
        if not self.training:
            return F.avg_pool2d(dense, list(stride), ceil_mode=True)
        for axis in range(2):
            kept = _sample(
                dense_sizes[axis], outs[axis], stride[axis], self.grid_size[axis], x.device
            )
            dense = dense.index_select(axis + 2, kept)
        return dense

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid_size={tuple(self.grid_size)}"


def _sample(size: int, out: int, stride: int, grid: int, device: torch.device) -> Tensor:
    """Samples ``out`` of ``size`` indices in order, grid / stride of every ``grid`` indices."""
    strips = -(-size // grid)
    per_strip = grid // stride
    keys = torch.rand(strips, grid, device=device)
    keys[-1, size - (strips - 1) * grid :] = 2  # indices beyond the end are never sampled
    kept = keys.topk(per_strip, largest=False).indices
    kept[-1, out - (strips - 1) * per_strip :] = grid  # the last strip may hold fewer outputs
    starts = torch.arange(strips, device=device).unsqueeze(1) * grid
    return (kept.sort(1).values + starts).flatten()[:out]


@MODELS.register_module()
class S3Pool2d(_SpatialSamplingPool2d):
    """S3Pool: max pooling with stride 1, followed by random sampling of rows and columns.

    Zhai et al., "S3Pool: Pooling with stochastic spatial sampling", CVPR 2017, section 3. The
    stride-1 map is divided into strips of ``grid_size`` rows. In training, grid_size / stride
    random rows of each are kept, in order, and likewise columns; the sample is the same for the
    whole batch. In evaluation every output is the average over its stride × stride cell of the map:
    the expectation if ``grid_size`` is the stride, otherwise the paper's approximation to it.

    The stride-1 map has one row per position of the window, padding included. Output row o has the
    rows from o * stride to the next cell; the last cell may be shorter, as in the authors' code.
    With ``ceil_mode`` the map extends to the start of the last window.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.
        grid_size: Rows and columns of a strip, a multiple of ``stride``, an int or 2 of them;
            larger values distort more. Defaults to None, the stride.
    """

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        *,
        grid_size: Ints | None = None,
    ):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode)
        self._set_grid_size(grid_size)

    def dense(self, x: Tensor, windows: Windows) -> Tensor:
        (top, left), (bottom, right) = windows.before, windows.after
        kernel_size, dilation = self._pooling.kernel_size, self._pooling.dilation
        x = F.pad(x, (left, right, top, bottom), value=-math.inf)
        return F.max_pool2d(x, list(kernel_size), 1, 0, list(dilation))


@MODELS.register_module()
class LiteS3DPPool2d(_SpatialSamplingPool2d, _PerChannelPool2d):
    """Detail-preserving pooling, lite and symmetric, with stochastic spatial sampling (Lite-S3DPP).

    Saeedan et al., "Detail-preserving pooling in deep networks", CVPR 2018, section 3: the weighted
    mean of each window with weights w_i = alpha + (sqrt((x_i - m)^2 + eps^2))^lambda, m the mean of
    the window (lite: a box filter), the reward symmetric in the sign of x_i - m (eq. 5). It is
    applied with stride 1 and followed by S3Pool's sampling, see :class:`S3Pool2d`, or in evaluation
    by the average over each cell. alpha and lambda are learned per channel, as exponentials. (The
    authors' code also divides each square by its window's mean square; the paper's formula, which
    is used here, does not.)

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: As for ``SoftPool2d``.
        grid_size: As for ``S3Pool2d``. Defaults to None, the stride.
        eps: eps of the formula. Defaults to sqrt(0.001), as in the authors' code.
        channels: Number of channels. Defaults to None, set by the first forward.

    Attributes:
        log_alpha, log_lambda: (C,). Initially 0, the centre of the authors' random initialisation.
    """

    def __init__(
        self,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Padding = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
        *,
        grid_size: Ints | None = None,
        eps: float = 0.001**0.5,
        channels: int | None = None,
    ):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode, channels=channels)
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps!r}")
        self._set_grid_size(grid_size)
        self.eps = eps

    log_alpha: Tensor
    log_lambda: Tensor

    def initial_values(self, channels: int) -> dict[str, Tensor]:
        return dict(log_alpha=torch.zeros(channels), log_lambda=torch.zeros(channels))

    def dense(self, x: Tensor, windows: Windows) -> Tensor:
        alpha, power = (
            p.to(x.dtype).exp()[:, None, None] for p in (self.log_alpha, self.log_lambda)
        )
        # Tap by tap, because a stack of stride-1 maps would be large.
        taps = windows.views(x, 0.0)
        present = windows.views(torch.ones_like(x[:1, :1]), 0.0)
        count = torch.stack(present).sum(0).clamp(min=1)
        mean = functools.reduce(torch.add, (tap / count for tap in taps))
        # All weights are divided by scale^lambda, so that large values do not overflow.
        sizes = ((tap - mean).detach().abs() for tap in taps)
        scale = functools.reduce(torch.maximum, sizes).clamp(min=self.eps)
        bias, floor = alpha * scale**-power, (self.eps / scale) ** 2
        weighted = total = x.new_zeros(())
        for tap, there in zip(taps, present, strict=True):
            square = ((tap - mean) / scale) ** 2 + floor
            reward = square.clamp(min=torch.finfo(x.dtype).tiny) ** (power / 2)
            weight = (bias + reward) * there
            total = total + weight
            weighted = weighted + weight * tap
        return weighted / torch.where(total == 0, 1, total)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps:.4g}"


#: Configs of the methods of the paper's Table 1, in its order and without ``kernel_size``.
METHODS = {
    "average": dict(type="torch.nn.AvgPool2d", count_include_pad=False),
    "maximum": dict(type="torch.nn.MaxPool2d"),
    "power-average": dict(type="mmsoftpool.PowerAvgPool2d"),
    "sum": dict(type="mmsoftpool.SumPool2d"),
    "lp": dict(type="mmsoftpool.LearnedNormPool2d"),
    "gate": dict(type="mmsoftpool.GatedPool2d"),
    "lite-s3dpp": dict(type="mmsoftpool.LiteS3DPPool2d"),
    "lip": dict(type="mmsoftpool.LIPool2d"),
    "stochastic": dict(type="mmsoftpool.StochasticPool2d"),
    "s3": dict(type="mmsoftpool.S3Pool2d"),
    "softpool": dict(type="SoftPool2d"),
}
