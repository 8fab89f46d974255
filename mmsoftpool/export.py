"""Export of a detector's network, or of its backbone, as ONNX or as a ``torch.export`` program.

Both take any batch and image size; where the neck joins levels without resizing them, as in YOLOX
and RTMDet, any multiple of the coarsest stride. In ONNX, SoftPool is decomposed into standard
operators; a ``torch.export`` program contains the operator ``mmsoftpool::soft_pool`` and needs
mmsoftpool to be imported before it is loaded.
"""

import contextlib
import importlib.util
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmengine.config import Config
from torch import Tensor, nn

from .detections import Detections, Preprocessing, metadata, onnx_translations
from .errors import UserError
from .files import write_atomically
from .runner import load_model

FORMATS = ("onnx", "pt2")
#: Largest allowed difference from PyTorch, relative to the largest output if that is above 1.
TOLERANCE = 1e-4
# Batch size, height and width.
_EXAMPLE = (2, 320, 384)
# Other batch sizes, a portrait image, sizes that no stride divides.
_CHECKS = ((1, 416, 256), (3, 333, 287))


class Network(nn.Module):
    """The exported part of a detector: all up to its head's raw outputs, or the backbone.

    Args:
        detector: A detector of mmdet.
        backbone: Whether to take only the backbone. Defaults to False.

    Raises:
        UserError: If it is neither a single-stage nor a two-stage detector with an RPN, and
            ``backbone`` is False.
    """

    def __init__(self, detector: nn.Module, backbone: bool = False):
        super().__init__()
        single = isinstance(detector, SingleStageDetector)
        two_stage = isinstance(detector, TwoStageDetector) and detector.with_rpn
        if not (backbone or single or two_stage):
            raise UserError(
                "detector must be a single-stage detector or a two-stage one with an RPN, got "
                f"{type(detector).__name__}; backbone=True exports only its backbone"
            )
        self.backbone = detector.backbone
        self.neck = nn.Identity() if backbone or not detector.with_neck else detector.neck
        self.head = None if backbone else detector.bbox_head if single else detector.rpn_head
        self.two_stage = two_stage and not backbone
        self.metadata: dict[str, str] = {}  # for the file

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """Runs the network.

        Args:
            image: (N, 3, H, W), float32, normalised as by the config's ``data_preprocessor``.

        Returns:
            The levels from fine to coarse, each (N, C, ceil(H / stride), ceil(W / stride)). Of a
            backbone: ``feature_0``, ``feature_1``, ... Of a single-stage detector's head:
            ``cls_score_0``, ..., ``bbox_pred_0``, ... and, if it has them, ``score_factor_0``, ...
            Of a two-stage detector: the neck's ``feature_0``, ..., which its second stage crops
            from, and the RPN's ``rpn_cls_score_0``, ..., ``rpn_bbox_pred_0``, ...
        """
        features = self.neck(self.backbone(image))
        groups = {"feature": features} if self.head is None or self.two_stage else {}
        if self.head is not None:
            names = ("cls_score", "bbox_pred", "score_factor")
            names = (f"rpn_{name}" if self.two_stage else name for name in names)
            groups |= dict(zip(names, self.head(features), strict=False))
        return {
            f"{name}_{level}": tensor
            for name, levels in groups.items()
            for level, tensor in enumerate(levels)
        }

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(image).values())

    def shapes(self) -> tuple[tuple, dict, list[tuple]]:
        """The shape of an example image, the dynamic axes, the shapes of images to compare on."""
        stride = divisor = self._stride()
        # Necks that concatenate a level with the upsampled next one, as YOLOX's and RTMDet's, take
        # only multiples of the stride.
        with contextlib.suppress(RuntimeError):  # sizes of tensors must match
            self.outputs(torch.zeros(1, 3, *_CHECKS[-1][1:]))
            divisor = 1
        axes = {0: torch.export.Dim("batch")}
        for axis, name in ((2, "height"), (3, "width")):
            # From two elements of the coarsest level on: one is a special case of torch.export.
            size = torch.export.Dim(name, min=stride // divisor + 1, max=(1 << 16) // divisor)
            axes[axis] = divisor * size if divisor > 1 else size
        checks = [
            (batch, 3, *(math.ceil(pixels / divisor) * divisor for pixels in size))
            for batch, *size in _CHECKS
        ]
        return (_EXAMPLE[0], 3, *_EXAMPLE[1:]), axes, checks

    def _stride(self) -> int:
        """Of the coarsest level."""
        levels = Network.outputs(self, torch.zeros(1, 3, *_EXAMPLE[1:])).values()
        rows = min(level.shape[2] for level in levels)
        return 2 ** math.ceil(math.log2(_EXAMPLE[1] / rows))

    @staticmethod
    def noise(shape: tuple, seed: int) -> Tensor:
        """An image."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def differences(got: list[Tensor], expected: dict[str, Tensor]) -> Iterator[tuple]:
        """Yields the name of each output, its largest difference and its largest value."""
        for tensor, (name, other) in zip(got, expected.items(), strict=True):
            same = tensor.shape == other.shape
            difference = (tensor - other).abs().max().item() if same else math.inf
            yield name, difference, other.abs().max().item()


class NetworkWithNMS(Network):
    """A whole single-stage detector, from pixels to boxes after NMS.

    Args:
        detector: A single-stage detector of mmdet.
        cfg: Its config.

    Raises:
        UserError: See :class:`Network`, :class:`~.detections.Preprocessing` and
            :class:`~.detections.Detections`.
    """

    def __init__(self, detector: nn.Module, cfg: Config):
        super().__init__(detector)
        if self.two_stage:
            raise UserError(
                f"with_nms needs a single-stage detector, got {type(detector).__name__}; without "
                "it, the file ends at the raw outputs of the RPN"
            )
        self.preprocessing = Preprocessing(cfg)
        self.detections = Detections(self.head)
        self.metadata = metadata(cfg, self.preprocessing)

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """Runs the detector.

        Args:
            image: (N, H, W, 3), uint8, in the channel order of ``LoadImageFromFile``, BGR;
                resized and not padded.

        Returns:
            ``dets`` and ``labels``, see :meth:`~.detections.Detections.forward`.
        """
        image, size = self.preprocessing(image)
        dets, labels = self.detections(self.head(self.neck(self.backbone(image))), size)
        return {"dets": dets, "labels": labels}

    def shapes(self) -> tuple[tuple, dict, list[tuple]]:
        """As :meth:`Network.shapes`. Where images are padded to a fixed size, none is larger, and
        those to compare on fill most of it: in the padding, boxes have the same scores."""
        smallest, largest, sizes = self._stride() + 1, (1 << 16,) * 2, [_EXAMPLE, *_CHECKS]
        if canvas := self.preprocessing.size:
            parts = ((2, 6), (1, 8), (3, 7))
            sizes = [(batch, *(n * part // 8 for n in canvas)) for batch, part in parts]
            smallest, largest = 2, canvas
        axes = {0: torch.export.Dim("batch")}
        for axis, name in ((1, "height"), (2, "width")):
            axes[axis] = torch.export.Dim(name, min=smallest, max=largest[axis - 1])
        example, *checks = ((*size, 3) for size in sizes)
        return example, axes, checks

    @staticmethod
    def noise(shape: tuple, seed: int) -> Tensor:
        """An image, smooth as a photo: for noise of single pixels, the scores of a detector can be
        the same up to the last bit, and NMS keeps any of these boxes."""
        batch, height, width, channels = shape
        coarse = torch.rand((batch, channels, 8, 8), generator=torch.Generator().manual_seed(seed))
        smooth = F.interpolate(coarse, (height, width), mode="bilinear")
        return (255 * smooth).byte().permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def differences(got: list[Tensor], expected: dict[str, Tensor]) -> Iterator[tuple]:
        """Yields the largest difference of the scores, and of the boxes, relative to the largest
        coordinate, from the nearest one of their class.

        Of boxes with nearly the same score, NMS may keep another one, and then others in its
        place: one score in a hundred may differ, and a quarter of the boxes have no counterpart.
        """
        size = max(1.0, expected["dets"][..., :4].abs().max().item())
        for dets, labels, *others in zip(*got, *expected.values(), strict=True):
            scores = (dets[:, 4] - others[0][:, 4]).abs()
            yield "scores", scores.quantile(0.99).item(), 1.0
            distances = torch.cdist(others[0][:, :4], dets[:, :4], p=math.inf) / size
            distances[others[1][:, None] != labels] = math.inf
            yield "boxes", distances.min(1).values.sort().values[len(labels) * 3 // 4].item(), 1.0


def build_network(
    cfg: Config, checkpoint: str, backbone: bool = False, with_nms: bool = False
) -> Network:
    """Builds the network of a config with a checkpoint's weights, in eval mode on the CPU.

    Args:
        cfg: The config.
        checkpoint: File or URL of the weights.
        backbone: Whether to take only the backbone. Defaults to False.
        with_nms: Whether to take the whole detector, from pixels to boxes. Defaults to False.

    Raises:
        UserError: If the checkpoint does not fit, or see :class:`Network` and
            :class:`NetworkWithNMS`.
        FileNotFoundError: If there is no such checkpoint.
    """
    detector = load_model(cfg, checkpoint)
    return (NetworkWithNMS(detector, cfg) if with_nms else Network(detector, backbone)).eval()


def export(network: Network, format: str, out: str) -> float:
    """Exports a network and compares the file with PyTorch on images of other sizes.

    Args:
        network: From :func:`build_network`.
        format: ``'onnx'`` or ``'pt2'``.
        out: The file to write; left as it was if the comparison fails.

    Returns:
        The largest absolute difference of any output from PyTorch.

    Raises:
        UserError: If ``format`` is something else or needs a missing package, or the file
            disagrees with PyTorch.
        FileNotFoundError: If there is no folder for ``out``.
    """
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "onnx":
        needed = ("onnx", "onnxscript", "onnxruntime")
        missing = [name for name in needed if not importlib.util.find_spec(name)]
        if missing:
            raise UserError(
                f"format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}"
            )
    with write_atomically(out) as temporary, torch.no_grad():
        shape, axes, checks = network.shapes()
        example = network.noise(shape, seed=0)
        names = list(network.outputs(example))
        program = torch.export.export(
            network, (example,), dynamic_shapes={"image": axes}, strict=False
        )
        if format == "onnx":
            _write_onnx(program, {"image": axes}, str(temporary), names, network.metadata)
        else:
            with open(temporary, "wb") as file:  # of a path it would keep the name
                torch.export.save(program, file, extra_files=network.metadata)
        return _compare(network, format, str(temporary), checks)


def _write_onnx(program, axes: dict, path: str, names: list[str], metadata: dict[str, str]) -> None:
    torch.onnx.export(
        program,
        (),
        path,
        dynamo=True,
        input_names=["image"],
        output_names=names,
        dynamic_shapes=axes,  # only for the names of the axes
        custom_translation_table=onnx_translations(),
        external_data=False,
        verbose=False,
    )
    import onnx

    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    foreign = {f"{node.domain}::{node.op_type}" for node in nodes}
    foreign |= {function.name for function in model.functions}
    if foreign:
        raise UserError(
            f"network must consist of standard ONNX operators, got {', '.join(sorted(foreign))}"
        )
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _compare(network: Network, format: str, path: str, shapes: list[tuple]) -> float:
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(image):
            return [torch.from_numpy(t) for t in session.run(None, {"image": image.numpy()})]
    else:
        with open(path, "rb") as file:
            run = torch.export.load(file).module()
    largest = 0.0
    for shape in shapes:
        image = network.noise(shape, seed=1)
        for name, difference, size in network.differences(run(image), network.outputs(image)):
            allowed = TOLERANCE * max(1.0, size)
            if not difference <= allowed:
                raise UserError(
                    f"the exported {name} differs from PyTorch for an image of {shape} by "
                    f"{difference:.2g}, {allowed:.2g} is allowed"
                )
            largest = max(largest, difference)
    return largest
