"""Checkpoints that survive a kill and a full disk, and the latest one that is intact."""

import os
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import IterBasedTrainLoop, find_latest_checkpoint

from ..errors import UserError
from ..files import write_atomically


@register_backend("atomic")
class AtomicBackend(LocalBackend):
    """Local files of mmengine, written completely or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with (
            write_atomically(filepath, exclusive=True) as temporary,
            temporary.open("wb") as file,
        ):
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())  # network file systems report a full disk only then


class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, without the moments at which it can lose an earlier checkpoint.

    mmengine removes the oldest checkpoint, and the previous best one, before it writes the new one
    in place. Here both are held until the new one is written, and a file in the run's folder is a
    complete checkpoint or not there. This takes the space of one more checkpoint than
    ``max_keep_ckpts``. Arguments as for mmengine's, with ``interval`` 1 by default; with
    ``backend_args``, ``file_client_args`` or a remote ``out_dir``, files are written as these say.
    """

    def __init__(self, interval: int = 1, *args, **kwargs):
        super().__init__(interval, *args, **kwargs)
        local = "://" not in str(self.out_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend="atomic")

    def before_train(self, runner):
        if isinstance(runner.train_loop, IterBasedTrainLoop) and self.by_epoch:
            raise UserError(
                "default_hooks.checkpoint.by_epoch must be False, because train_cfg counts "
                "iterations and would save no checkpoint before the last one"
            )
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # with room for one more
        # The checkpoint has full paths, which in a copy of a run's folder lead to the original.
        if "last_ckpt" in runner.message_hub.runtime_info:
            # mmengine forgets it, and would not save a new best score that comes before an epoch.
            self.last_ckpt = self._here(runner.message_hub.get_info("last_ckpt"))
        if getattr(self, "best_ckpt_path", None):
            self.best_ckpt_path = self._here(self.best_ckpt_path)
        for key, path in getattr(self, "best_ckpt_path_dict", {}).items():
            self.best_ckpt_path_dict[key] = path and self._here(path)

    def _here(self, path: str) -> str:
        return self.file_backend.join_path(self.out_dir, os.path.basename(path))

    def after_train_epoch(self, runner):
        with self._holding_earlier(runner):
            super().after_train_epoch(runner)

    def after_train_iter(self, runner, *args, **kwargs):
        with self._holding_earlier(runner):
            super().after_train_iter(runner, *args, **kwargs)

    def after_val_epoch(self, runner, metrics):
        if not hasattr(self, "file_backend"):
            return  # a validation without a training saves nothing
        with self._holding_earlier(runner):
            super().after_val_epoch(runner, metrics)

    @contextmanager
    def _holding_earlier(self, runner) -> Iterator[None]:
        """Postpones the removal of earlier checkpoints to the end of the block."""
        limited = self.max_keep_ckpts > 0
        replaced = []  # the previous best ones
        remove, self.file_backend.remove = self.file_backend.remove, replaced.append
        self.max_keep_ckpts += limited
        try:
            yield
        finally:
            self.file_backend.remove = remove
            self.max_keep_ckpts -= limited
        # If a kill comes before this, the resumed run removes what the new checkpoint lists beyond
        # max_keep_ckpts, and replaces the best one again.
        best = {getattr(self, "best_ckpt_path", None)}
        best |= set(getattr(self, "best_ckpt_path_dict", {}).values())
        while limited and len(self.keep_ckpt_ids) > self.max_keep_ckpts:
            oldest = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
            replaced.append(self.file_backend.join_path(self.out_dir, oldest))
        for path in replaced:
            if path not in best and is_main_process() and self.file_backend.isfile(path):
                remove(path)


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
    except Exception:  # damage raises errors of many kinds
        return False
