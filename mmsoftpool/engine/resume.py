"""What a run needs to go on after an interruption: seeds per epoch, checkpoints that load."""

import os
import zipfile
from pathlib import Path

import numpy as np
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import find_latest_checkpoint, set_random_seed


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seeds Python, NumPy and torch anew at the start of every training epoch.

    What is random in an epoch (augmentation, sampling of proposals) then depends on the run's seed,
    the epoch and the rank alone, and no longer on the epochs before it: a run that goes on from a
    checkpoint does what it would have done without the interruption. Workers of the data loader get
    their seeds from this one as torch gives them; see :func:`keep_torch_seed`.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner):
        # A resumed run without a seed of its own takes the checkpoint's, after its sampler is made.
        if runner.cfg.get("randomness", {}).get("diff_rank_seed"):
            return  # the ranks' seeds differ, and samplers that differ would draw images twice
        loader = runner.train_dataloader
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if hasattr(sampler, "seed"):
                sampler.seed = runner.seed

    def before_train_epoch(self, runner):
        sequence = np.random.SeedSequence((runner.seed, runner.epoch, get_rank()))
        set_random_seed(int(sequence.generate_state(1)[0]))


@FUNCTIONS.register_module()
def keep_torch_seed(worker_id: int) -> None:
    """A ``worker_init_fn`` that leaves a worker with the seed that torch has given it: of the main
    process's generator, different in every epoch. mmengine's own gives the same in every epoch."""


def find_good_checkpoint(work_dir) -> tuple[str | None, list[str]]:
    """The latest checkpoint of a run that can be read to its end.

    Args:
        work_dir (str | Path): Work directory of the run.

    Returns:
        tuple: The checkpoint's path, None if there is none, and the paths of later ones that are
        damaged or gone.
    """
    saved = [*Path(work_dir).glob("epoch_*.pth"), *Path(work_dir).glob("iter_*.pth")]
    candidates = sorted(map(str, saved), key=os.path.getmtime, reverse=True)
    last = find_latest_checkpoint(str(work_dir))  # what mmengine noted after its last whole one
    if last is not None:
        candidates.insert(0, last)
    damaged = []
    for path in dict.fromkeys(candidates):
        if _is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _is_whole(path: str) -> bool:
    """Whether a file of torch.save is complete: a zip archive whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
