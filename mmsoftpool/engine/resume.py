"""Resuming an interrupted run: one seed per epoch, the latest intact checkpoint."""

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
    """Hook that seeds Python, NumPy and torch at the start of every training epoch.

    The random numbers of an epoch (augmentation, sampling of proposals) then depend only on the
    seed of the run, the epoch and the rank, and not on the epochs before: a run that resumes from a
    checkpoint ends in the same weights as an uninterrupted one. torch derives the seeds of the data
    loader's workers from this seed; see :func:`keep_torch_seed`.
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
    """A ``worker_init_fn`` that keeps the seed that torch gives a worker.

    torch draws it from the generator of the main process, so it differs between epochs. mmengine's
    own ``worker_init_fn`` sets the same seed in every epoch.
    """


def find_intact_checkpoint(work_dir: str | Path) -> tuple[str | None, list[str]]:
    """Finds the latest checkpoint in a run's folder that is not damaged.

    Only files in ``work_dir`` itself are considered. mmengine notes the full path of its latest
    checkpoint in the file ``last_checkpoint``; in a copy of a run's folder that path still leads to
    the original, so only the file name is taken from it.

    Args:
        work_dir: Folder of the run.

    Returns:
        tuple: The path of the checkpoint, or None if there is none; and the paths of later
        checkpoints that are damaged or missing.
    """
    saved = [*Path(work_dir).glob("epoch_*.pth"), *Path(work_dir).glob("iter_*.pth")]
    candidates = sorted(map(str, saved), key=os.path.getmtime, reverse=True)
    last = find_latest_checkpoint(str(work_dir))
    if last:
        candidates.insert(0, str(Path(work_dir, Path(last).name)))
    skipped = []
    for path in dict.fromkeys(candidates):
        if _is_intact(path):
            return path, skipped
        skipped.append(path)
    return None, skipped


def _is_intact(path: str) -> bool:
    """Whether a file of torch.save is complete: a zip archive with correct checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
