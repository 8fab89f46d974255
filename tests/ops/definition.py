"""SoftPool by its definition: a loop over windows in float64, written from eq. 1 and 2 alone.

And the poolings and sharpnesses that the tests run it over.
"""

import itertools
import math

import torch
import torch.nn.functional as F

# kernel_size, stride, padding, dilation, ceil_mode
POOLINGS = [
    (2, 2, 0, 1, False),  # the authors' stem
    (3, 2, 1, 1, False),  # ResNet's stem
    (3, 2, 1, 1, True),
    (3, 1, 1, 1, False),
    (2, 1, 0, 1, False),
    (1, 1, 0, 1, False),
    (3, 5, 1, 1, False),  # windows with gaps
    (5, 2, 2, 2, True),
    ((3, 2), (1, 3), (1, 0), (2, 1), True),
    ((2, 5), (3, 2), (1, 2), (1, 2), False),
]
#: From average pooling to nearly max pooling.
ALPHAS = [0.0, 0.5, 1.0, 4.0, 30.0]


def windows(size, out, kernel_size, stride, before, dilation):
    """For every output position, the input positions of its window that exist."""
    for position in itertools.product(*map(range, out)):
        starts = [o * s - p for o, s, p in zip(position, stride, before, strict=True)]
        taps = itertools.product(*map(range, kernel_size))
        places = (
            tuple(b + t * d for b, t, d in zip(starts, tap, dilation, strict=True)) for tap in taps
        )
        inside = [
            place for place in places if all(0 <= i < n for i, n in zip(place, size, strict=True))
        ]
        yield position, inside


def adaptive_windows(size, out):
    """As :func:`windows`, of adaptive pooling."""
    for position in itertools.product(*map(range, out)):
        ranges = [
            range(math.floor(i * n / o), math.ceil((i + 1) * n / o))
            for i, n, o in zip(position, size, out, strict=True)
        ]
        yield position, list(itertools.product(*ranges))


def soft_pool(
    x, out, kernel_size, stride, before, dilation, grad_output=None, gradient="exact", alpha=1.0
):
    """Value and input gradient in float64.

    Args:
        x: (N, C, spatial...).
        out: Output size of every axis; what torch's own pools say.
        kernel_size, stride, before, dilation: One number per axis; ``before`` is the padding.
        grad_output: (N, C, out...); ones by default.
    """
    taps = list(windows(x.shape[2:], out, kernel_size, stride, before, dilation))
    return _soft_pool(x, out, taps, grad_output, gradient, alpha)


def adaptive_soft_pool(x, out, grad_output=None, gradient="exact", alpha=1.0):
    """As :func:`soft_pool`, of adaptive pooling."""
    taps = list(adaptive_windows(x.shape[2:], out))
    return _soft_pool(x, out, taps, grad_output, gradient, alpha)


def _soft_pool(x, out, windows, grad_output, gradient, alpha):
    x = x.double()
    y = x.new_empty(*x.shape[:2], *out)
    grad = torch.zeros_like(x)
    g = torch.ones_like(y) if grad_output is None else grad_output.double()
    for n, c in itertools.product(*map(range, x.shape[:2])):
        plane = x[n, c]
        for position, inside in windows:
            taps = [plane[place].item() for place in inside]
            if not taps:  # a dilated window can lie in the padding as a whole
                y[(n, c, *position)] = -math.inf
                continue
            largest = max(taps)
            weights = [math.exp(alpha * (tap - largest)) for tap in taps]
            weights = [weight / math.fsum(weights) for weight in weights]
            value = math.fsum(w * tap for w, tap in zip(weights, taps, strict=True))
            y[(n, c, *position)] = value
            for place, w, tap in zip(inside, weights, taps, strict=True):
                slope = w * (1 + alpha * (tap - value)) if gradient == "exact" else w
                grad[(n, c, *place)] += g[(n, c, *position)].item() * slope
    return y, grad


def _pair(value):
    return (value, value) if isinstance(value, int) else value


def soft_pool2d(x, pooling, grad_output=None, gradient="exact", alpha=1.0):
    """:func:`soft_pool` of (N, C, H, W) for one of POOLINGS, with the sizes of F.max_pool2d."""
    kernel_size, stride, padding, dilation, ceil_mode = pooling
    x = x.detach()
    out = F.max_pool2d(x.float(), kernel_size, stride, padding, dilation, ceil_mode).shape[2:]
    grid = map(_pair, (kernel_size, stride, padding, dilation))
    return soft_pool(x, out, *grid, grad_output, gradient, alpha)
