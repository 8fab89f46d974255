"""A single-stage detector as one graph: from the pixels of an image to its boxes after NMS.

Everything that follows the resizing of an image is in the graph: padding and normalisation, the
network, decoding, NMS. As mmdeploy's, its outputs have a fixed number of boxes. :mod:`~.export`
writes it; ``import mmsoftpool.detections`` before ``torch.export.load``.
"""

import json

import torch
import torch.nn.functional as F
from mmcv.ops import batched_nms
from mmdet.models.dense_heads import YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.registry import DATASETS
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from torch import Tensor, nn

from ._openmmlab import decodes_as
from .config import type_name
from .errors import UserError

#: Boxes of an image where ``test_cfg`` has no ``max_per_img``, as for YOLOX.
MAX_PER_IMG = 300

_library = torch.library.Library("mmsoftpool", "FRAGMENT")
_library.define(
    "batched_nms(Tensor boxes, Tensor scores, Tensor labels, float iou_threshold, "
    "int max_per_img) -> Tensor"
)


@torch.library.impl(_library, "batched_nms", "CompositeExplicitAutograd")
def _batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_per_img: int
) -> Tensor:
    """mmcv's NMS for a batch: ``boxes`` (N, K, 4), ``scores`` (N, K), ``labels`` (N, K).

    An operator of its own, because its result has a fixed shape: the scores, with 0 for each box
    that is suppressed. In ONNX it is a ``NonMaxSuppression``.
    """
    kept = []
    cfg = dict(type="nms", iou_threshold=iou_threshold)
    for image in zip(boxes, scores, labels, strict=True):
        dets, index = batched_nms(*image, cfg)
        row = torch.zeros_like(image[1])
        row[index[:max_per_img]] = dets[:max_per_img, 4]
        kept.append(row)
    return torch.stack(kept)


@torch.library.impl(_library, "batched_nms", "Meta")
def _batched_nms_shape(boxes: Tensor, scores: Tensor, *args) -> Tensor:
    return torch.empty_like(scores)


def onnx_translations() -> dict:
    """How ``torch.onnx.export`` writes the operator."""
    from onnxscript import opset18 as op

    def nms(boxes, scores, labels, iou_threshold: float, max_per_img: int):
        def integers(*values):
            return op.Constant(value_ints=values)

        # Boxes of different classes are moved apart, as in mmcv's batched_nms.
        largest = op.ReduceMax(boxes, integers(1, 2), keepdims=1)
        apart = op.Add(largest, op.Constant(value_float=1.0))
        offsets = op.Mul(op.Unsqueeze(op.CastLike(labels, boxes), integers(2)), apart)
        selected = op.NonMaxSuppression(
            op.Add(boxes, offsets),
            op.Unsqueeze(scores, integers(1)),
            integers(max_per_img),
            op.Constant(value_floats=[iou_threshold]),
        )
        index = op.Gather(selected, integers(0, 2), axis=1)  # image and box
        return op.ScatterND(op.Sub(scores, scores), index, op.GatherND(scores, index))

    return {torch.ops.mmsoftpool.batched_nms.default: nms}


class Preprocessing(nn.Module):
    """A config's padding and normalisation of images that are resized already.

    Args:
        cfg: The config; its test pipeline and ``data_preprocessor`` are used.

    Raises:
        UserError: If they do anything else to an image than to resize it with ``keep_ratio``, to
            pad it to a fixed size and to normalise it.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        steps = get_test_pipeline_cfg(cfg)
        steps = [(type_name(s), dict(s)) for s in steps]
        steps = [(name, s) for name, s in steps if not name.startswith(("Load", "Pack"))]
        resize, pad = dict(steps).get("Resize", {}), dict(steps).get("Pad")
        #: The longer and the shorter side that an image is resized to fit.
        self.scale = resize.get("scale") or ()
        self.scale = [self.scale] * 2 if isinstance(self.scale, int) else sorted(self.scale)[::-1]
        if (
            [name for name, _ in steps] not in (["Resize"], ["Resize", "Pad"])
            or resize.keys() != {"type", "scale", "keep_ratio"}
            or len(self.scale) != 2
            or not resize["keep_ratio"]
        ):
            raise UserError(
                "with_nms needs a test pipeline with Resize(scale=..., keep_ratio=True) and at "
                f"most a Pad after it, got {[step for _, step in steps]}"
            )
        self.size, self.fill = None, 0.0
        if pad is not None:
            square = pad.get("pad_to_square")
            size = self.scale if square else pad.get("size")
            fill = pad.get("pad_val", 0)
            fill = fill.get("img", 0) if isinstance(fill, dict) else fill
            fill = set(fill) if isinstance(fill, (list, tuple)) else {fill}
            others = pad.keys() - {"type", "size", "pad_to_square", "pad_val"}
            if others or len(fill) > 1 or not size or (square and len(set(size)) > 1):
                raise UserError(
                    "with_nms needs a Pad to a fixed size, or to a square that Resize fills, with "
                    f"the same pad_val for each channel, got {pad}"
                )
            self.size, self.fill = tuple(size)[::-1], float(fill.pop())
        settings = dict(cfg.model.get("data_preprocessor") or {})
        if type_name(settings) != "DetDataPreprocessor":
            raise UserError(
                "with_nms needs the data_preprocessor DetDataPreprocessor, got "
                f"{settings.get('type')}"
            )
        self.flip = bool(settings.get("bgr_to_rgb") or settings.get("rgb_to_bgr"))
        self.divisor = settings.get("pad_size_divisor", 1)
        self.pad_value = float(settings.get("pad_value", 0))
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = settings.get(name) or [default] * 3
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Takes (N, H, W, 3); returns (N, 3, H', W') and the size that boxes are clipped to."""
        image = image.permute(0, 3, 1, 2).contiguous().float()
        if self.size:
            image = _pad(image, self.size, self.fill)
        size = image.shape[2], image.shape[3]
        image = ((image.flip(1) if self.flip else image) - self.mean) / self.std
        padded = [(n + self.divisor - 1) // self.divisor * self.divisor for n in size]
        return _pad(image, padded, self.pad_value), size


def _pad(image: Tensor, size, value: float) -> Tensor:
    height, width = image.shape[2:]
    return F.pad(image, (0, size[1] - width, 0, size[0] - height), value=value)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are, with 0 where a row has fewer than k."""
    enough = isinstance(scores.shape[1], int) and scores.shape[1] >= k  # else a symbol, in export
    return (scores if enough else F.pad(scores, (0, k))).topk(k)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (N, A, C) by their (N, K) indices."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


class Detections(nn.Module):
    """Decoding of a dense head's outputs, and NMS, for a batch and with a fixed number of boxes.

    Args:
        head: An mmdet head that predicts as ``BaseDenseHead`` does, such as RetinaNet's, ATSS's,
            FCOS's or RTMDet's, or as ``YOLOXHead``.

    Raises:
        UserError: If the head predicts in a way of its own, or ``test_cfg`` asks for another NMS.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self.yolox = decodes_as(head, YOLOXHead)
        special = getattr(head.loss_cls, "custom_cls_channels", False)
        if special or not (self.yolox or decodes_as(head, BaseDenseHead)):
            raise UserError(
                "with_nms needs a head that predicts as mmdet's BaseDenseHead or YOLOXHead, got "
                f"{type(head).__name__}; without it, the file ends at the head's raw outputs"
            )
        cfg = head.test_cfg
        nms = cfg.get("nms") or {}
        known = nms.get("type") == "nms" and nms.keys() == {"type", "iou_threshold"}
        if not known or cfg.get("min_bbox_size", 0) > 0:
            raise UserError(
                "with_nms needs test_cfg.nms=dict(type='nms', iou_threshold=...) and no "
                f"min_bbox_size above 0, got {dict(cfg)}"
            )
        self.head = [head]  # no child: it is one of the network's
        self.nms_pre = cfg.get("nms_pre", -1)
        self.iou_threshold = float(nms.iou_threshold)
        self.max_per_img = cfg.get("max_per_img", MAX_PER_IMG)

    def forward(self, outputs: tuple[list[Tensor], ...], size) -> tuple[Tensor, Tensor]:
        """Takes the head's outputs and the height and width that boxes are clipped to.

        Returns:
            ``dets`` (N, ``max_per_img``, 5): corners x1, y1, x2, y2 and score, from the highest
            score on; ``labels`` (N, ``max_per_img``), -1 where there are fewer boxes.
        """
        boxes, scores, labels = (self._yolox if self.yolox else self._dense)(*outputs, size=size)
        if self.head[0].test_cfg.get("min_bbox_size", -1) >= 0:
            scores = scores * (boxes[..., 2:] > boxes[..., :2]).all(-1)
        kept = torch.ops.mmsoftpool.batched_nms(
            boxes, scores, labels, self.iou_threshold, self.max_per_img
        )
        scores, index = _largest(kept, self.max_per_img)
        index = index.clamp(max=kept.shape[1] - 1)
        found = scores > 0
        boxes = torch.where(found[..., None], _take(boxes, index), 0)
        labels = torch.where(found, labels.gather(1, index), -1)
        return torch.cat([boxes, scores[..., None]], -1), labels

    def _dense(self, cls_scores, bbox_preds, score_factors=None, *, size):
        head = self.head[0]
        sizes = [level.shape[2:] for level in cls_scores]
        priors = head.prior_generator.grid_priors(sizes, device=cls_scores[0].device)
        levels = []
        for level, prior in enumerate(priors):
            scores = _rows(cls_scores[level], head.cls_out_channels)
            scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
            classes, scores = scores.shape[2], scores.flatten(1)
            k = scores.shape[1]
            if self.nms_pre > 0:
                k = min(self.nms_pre, k) if isinstance(k, int) else self.nms_pre
            scores, index = _largest(scores, k)
            anchor = (index // classes).clamp(max=prior.shape[0] - 1)
            deltas = _take(_rows(bbox_preds[level], 4), anchor)
            if score_factors is not None:
                factors = _take(_rows(score_factors[level], 1), anchor)[..., 0]
                scores = scores * factors.sigmoid()
            levels.append((scores, index % classes, prior[anchor], deltas))
        scores, labels, priors, deltas = (torch.cat(part, 1) for part in zip(*levels, strict=True))
        boxes = head.bbox_coder.decode(priors.flatten(0, 1), deltas.flatten(0, 1), max_shape=size)
        return boxes.view_as(deltas), scores, labels

    def _yolox(self, cls_scores, bbox_preds, objectnesses, *, size):
        head = self.head[0]
        sizes = [level.shape[2:] for level in cls_scores]
        priors = head.prior_generator.grid_priors(
            sizes, device=cls_scores[0].device, with_stride=True
        )

        def join(levels, channels):
            return torch.cat([_rows(level, channels) for level in levels], 1)

        priors, boxes = torch.cat(priors), join(bbox_preds, 4)
        centres = boxes[..., :2] * priors[:, 2:] + priors[:, :2]
        half = boxes[..., 2:].exp() * priors[:, 2:] / 2
        boxes = torch.cat([centres - half, centres + half], -1)
        scores, labels = join(cls_scores, head.cls_out_channels).sigmoid().max(-1)
        return boxes, scores * join(objectnesses, 1)[..., 0].sigmoid(), labels


def _rows(level: Tensor, channels: int) -> Tensor:
    """(N, A * channels, H, W) as (N, H * W * A, channels)."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, channels)


def metadata(cfg: Config, preprocessing: Preprocessing) -> dict[str, str]:
    """What an application needs beside the graph, as JSON by name.

    ``scale``: the longer and the shorter side to resize an image to fit; ``classes``: the names;
    ``score_thr``: mmdet drops boxes of lower scores, before it multiplies them by a centerness.
    """
    dataset = cfg.test_dataloader.dataset
    classes = dataset.get("metainfo", {}).get("classes")
    kind = DATASETS.get(dataset.type) if isinstance(dataset.type, str) else dataset.type
    classes = classes or kind.METAINFO["classes"]
    values = dict(
        scale=preprocessing.scale,
        classes=classes,
        score_thr=cfg.model.test_cfg.get("score_thr", 0),
    )
    return {name: json.dumps(value) for name, value in values.items()}
