"""Private names of mmengine and mmdet, all in one place, each with what breaks without it."""

from mmengine.analysis import complexity_analysis

from .ops.flops import FVCORE


def count_flops() -> None:
    """Adds SoftPool's FLOP formula to mmengine's, which has no public way to add one.

    Without it, mmdet's ``get_flops.py`` counts SoftPool as 0 and lists it as unsupported.
    """

    getattr(complexity_analysis, "_DEFAULT_SUPPORTED_FLOP_OPS", {}).update(FVCORE)
    # A pool has no activations of its own, as in the counts of torch's pools: None.
    activations = getattr(complexity_analysis, "_DEFAULT_SUPPORTED_ACT_OPS", {})
    activations.update(dict.fromkeys(FVCORE))


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


def decodes_as(head, base) -> bool:
    """Whether an mmdet head turns its raw outputs into boxes with the methods of ``base``.

    Without it, a head that overrides one of them would be exported with wrong boxes.
    """
    names = ("predict", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")
    methods = (*names, "_bbox_decode")  # the last is YOLOX's
    return all(getattr(type(head), name, None) is getattr(base, name, None) for name in methods)
