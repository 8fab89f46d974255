"""Resuming an interrupted run: history-independent random numbers, missed validations."""

from bisect import bisect
from contextlib import suppress
from pathlib import Path

import numpy as np
from mmengine.dataset import DefaultSampler
from mmengine.dist import broadcast_object_list, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, set_random_seed
from torch.utils.data import BatchSampler, DataLoader, get_worker_info

from .._openmmlab import end_workers
from ..files import write_text
from ..registry import keep_torch_seed


class EpochSeedHook(Hook):
    """Hook that seeds Python, NumPy and torch at the start of every training epoch.

    The random numbers of an epoch (augmentation, sampling of proposals) then depend only on the
    seed of the run, the epoch and the rank, and not on the epochs before: a run that resumes from a
    checkpoint ends in the same weights as an uninterrupted one. Every epoch has new workers, whose
    seeds torch derives from the epoch's; ``persistent_workers`` has no effect.

    In an ``IterBasedTrainLoop`` every iteration has its own seed, and every batch.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner):
        loader = runner.train_dataloader
        if "worker_init_fn" not in runner.cfg.get("train_dataloader", {}):
            loader.worker_init_fn = keep_torch_seed  # mmengine's has the same seed in every epoch
        # A resumed run without a seed of its own takes the checkpoint's, after its sampler is made.
        if runner.cfg.get("randomness", {}).get("diff_rank_seed"):
            return  # the ranks' seeds differ, and samplers that differ would draw images twice
        sampler = _sampler(loader)
        if hasattr(sampler, "seed"):
            sampler.seed = runner.seed

    def before_train_epoch(self, runner):
        seed = (runner.seed, runner.epoch, get_rank())
        _seed(*seed)
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            runner.train_loop.dataloader_iterator = SeededBatches(runner.train_dataloader, seed)
        else:
            end_workers(runner.train_dataloader)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            _seed(runner.seed, runner.iter, get_rank(), 0)

    def after_train(self, runner):
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            runner.train_loop.dataloader_iterator = None  # ends the workers


def _seed(*sequence: int) -> None:
    set_random_seed(int(np.random.SeedSequence(sequence).generate_state(1)[0]))


def _sampler(loader: DataLoader):
    """The sampler of images, also that of a batch sampler."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


class SeededBatches:
    """Endless iterator over a data loader, in which every batch has its own random numbers.

    It takes the place of mmengine's iterator in an ``IterBasedTrainLoop``. There, the random
    numbers of a batch depend on all batches that the worker loaded before it.

    Args:
        loader: The data loader.
        seed: Numbers that the seeds of all batches are derived from.
    """

    def __init__(self, loader: DataLoader, seed: tuple[int, ...]):
        self.loader = loader
        self.seeds = _BatchSeeds(loader.collate_fn, seed)
        loader.collate_fn, loader.worker_init_fn = self.seeds, self.seeds.start_worker
        self.drawn = 0  # batches
        self.passes = 0  # over the data
        self.iterator = None

    def __next__(self) -> dict:
        if self.iterator is None:
            self._start()
        try:
            batch = self._load()
        except StopIteration:
            self._set_pass(self.passes + 1)
            self._start()
            batch = self._load()
        self.drawn += 1
        return batch

    def _load(self) -> dict:
        if self.loader.num_workers == 0:
            self.seeds.apply(self.drawn)
        return next(self.iterator)

    def skip_iter(self, count: int) -> None:
        """Skips batches of earlier iterations; mmengine's loop calls it once, when it resumes."""
        sampler = _sampler(self.loader)
        if type(sampler) is DefaultSampler:  # whole passes need no loading
            self._set_pass(count // len(self.loader))
            self.drawn = self.passes * len(self.loader)
        elif hasattr(sampler, "skip") and type(self.loader.batch_sampler) is BatchSampler:
            sampler.skip(count * self.loader.batch_size)
            self.drawn = count
        while self.drawn < count:
            next(self)

    def _start(self) -> None:
        self.iterator = None
        end_workers(self.loader)  # persistent ones would continue with their earlier seeds
        self.seeds.number = self.drawn  # a worker starts with this state
        self.iterator = iter(self.loader)

    def _set_pass(self, number: int) -> None:
        self.passes = number
        with suppress(AttributeError):  # a sequential sampler has no order to change
            _sampler(self.loader).set_epoch(number)


class _BatchSeeds:
    """A ``worker_init_fn``, and a ``collate_fn`` that sets the seed of the worker's next batch."""

    def __init__(self, collate, seed: tuple[int, ...]):
        self.collate, self.seed = collate, seed
        self.number = 0  # of the next batch

    def apply(self, number: int) -> None:
        _seed(*self.seed, number, 1)

    def start_worker(self, worker_id: int) -> None:
        self.number += worker_id  # the workers take turns
        self.apply(self.number)

    def __call__(self, samples: list):
        batch = self.collate(samples)
        worker = get_worker_info()
        if worker is not None:
            self.number += worker.num_workers
            self.apply(self.number)
        return batch


class MissedValidationHook(Hook):
    """Hook that repeats an interrupted validation when the run resumes.

    mmengine saves a checkpoint and then validates it; a run that is killed between the two would
    have no metrics for this epoch, and might keep a checkpoint as the best one that is not. The
    file ``last_validation`` in the run's folder has the number of the latest validated epoch or
    iteration.
    """

    priority = "LOWEST"  # the other hooks are ready for a validation, and have saved its results

    def __init__(self):
        self.in_training = False

    def before_train(self, runner):
        self.in_training = True
        loop, known = runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)
        if runner.val_loop is None or not isinstance(loop, known):
            return
        step, last = _step(loop)
        interval = loop.dynamic_intervals[bisect(loop.dynamic_milestones, step + 1) - 1]
        due = step >= max(loop.val_begin, 1) and (step % interval == 0 or step == last)
        note = _note(runner)
        missed = [due and not (note.is_file() and note.read_text() == str(step))]
        broadcast_object_list(missed)  # all processes follow the first one
        if missed[0]:
            runner.logger.info("Repeating the interrupted validation")
            runner.val_loop.run()
        elif step == 0 and is_main_process():
            note.unlink(missing_ok=True)  # that of an earlier run

    def after_val_epoch(self, runner, metrics=None):
        if self.in_training and is_main_process():
            write_text(_note(runner), str(_step(runner.train_loop)[0]), exclusive=True)


def _step(loop) -> tuple[int, int]:
    """The epochs or iterations that a loop has finished, and their final number."""
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    return (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)


def _note(runner) -> Path:
    return Path(runner.work_dir, "last_validation")
