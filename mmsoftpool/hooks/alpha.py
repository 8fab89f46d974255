"""Training with a sharpness alpha that changes, so that the detector can be used with several."""

import math

import numpy as np
from mmengine.hooks import Hook

from ..errors import UserError
from ..ops.modules import SoftPool2d


class _AlphaHook(Hook):
    """Hook that sets alpha of the SoftPools in every training iteration.

    Validation, and the network after the training, have the alpha of the config. The subclasses'
    ``alpha(runner, alpha)`` is that of the next iteration, of a pool with ``alpha`` in the config.
    """

    def before_train(self, runner):
        modules = runner.model.modules()
        self.pools = [(pool, pool.alpha) for pool in modules if isinstance(pool, SoftPool2d)]
        if not self.pools:
            raise UserError(f"{type(self).__name__} needs a model with a SoftPool2d, got none")

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for pool, alpha in self.pools:
            pool.alpha = self.alpha(runner, alpha)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for pool, alpha in self.pools:
            pool.alpha = alpha


class RandomAlphaHook(_AlphaHook):
    """Hook that draws alpha anew for every training iteration, for a detector of many alphas.

    The logarithm of alpha is uniform; all pools and processes have the same. It depends only on
    ``randomness.seed`` of the config, 0 without one, and the iteration.

    Args:
        low (float): Smallest alpha, above 0. Defaults to 0.5.
        high (float): Largest alpha. Defaults to 8.

    Raises:
        UserError: If they are not in this order.
    """

    def __init__(self, low: float = 0.5, high: float = 8.0):
        if not 0 < low <= high < math.inf:
            raise UserError(f"low and high must be 0 < low <= high, got {low} and {high}")
        self.low, self.high = low, high

    def alpha(self, runner, alpha):
        seed = runner.cfg.get("randomness", {}).get("seed") or 0
        place = np.random.default_rng((seed, runner.iter)).uniform()
        return self.low * (self.high / self.low) ** place


class AlphaAnnealingHook(_AlphaHook):
    """Hook that moves alpha during the training, by a constant factor, to that of the config.

    With ``alpha=32`` in the config, a detector ends as one that runs with max pooling.

    Args:
        start (float): Alpha of the first iteration, above 0. Defaults to 1.

    Raises:
        UserError: If ``start`` or the alpha of a pool is not above 0.
    """

    def __init__(self, start: float = 1.0):
        if not 0 < start < math.inf:
            raise UserError(f"start must be above 0, got {start}")
        self.start = start

    def alpha(self, runner, alpha):
        if alpha <= 0:
            raise UserError(f"AlphaAnnealingHook needs pools with alpha above 0, got {alpha}")
        return self.start * (alpha / self.start) ** (runner.iter / max(1, runner.max_iters - 1))
