"""Private names of mmengine and mmdet, all in one place, each with what breaks without it."""

from mmengine.analysis import complexity_analysis

from .ops.library import forward_flops


def count_flops() -> None:
    """Adds SoftPool's FLOP formula to mmengine's, which has no public way to add one.

    Without it, mmdet's ``get_flops.py`` counts SoftPool as 0 and lists it as unsupported.
    """

    def soft_pool(inputs, outputs) -> int:
        kernel_size = [value.toIValue() for value in inputs[1].node().inputs()]
        return forward_flops(None, kernel_size, out_shape=outputs[0].type().sizes())

    # A pool has no activations of its own, as in the counts of torch's pools: None.
    for table, formula in (("FLOP", soft_pool), ("ACT", None)):
        formulas = getattr(complexity_analysis, f"_DEFAULT_SUPPORTED_{table}_OPS", {})
        formulas["mmsoftpool::soft_pool"] = formula


def coco_api(metric):
    """The COCO annotations of an mmdet ``CocoMetric``, an object with pycocotools' interface.

    None if the metric takes them from its data set. Without it, an evaluator with the annotation
    file of another split is not noticed.
    """
    return getattr(metric, "_coco_api", None)


def end_workers(loader) -> None:
    """Ends the persistent workers of a DataLoader, so that its next epoch starts new ones.

    mmdet's hooks that switch pipelines do the same. Without it, the random numbers of the workers
    depend on all earlier epochs.
    """
    loader._iterator = None
