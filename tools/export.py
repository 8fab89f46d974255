#!/usr/bin/env python
"""Exports a detector as ONNX or as a torch.export program, for any batch and image size.

What is exported goes from the normalised image to the raw outputs of the head, before anchors and
NMS: of a two-stage detector the neck's features and the RPN's outputs. The file is compared with
PyTorch before it is kept.

Example: python tools/export.py configs/retinanet_r50_softpool.py epoch_12.pth --format onnx
"""

import logging
import warnings
from pathlib import Path

from mmengine.config import DictAction

from mmsoftpool import cli, engine


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument(
        "--format",
        choices=["onnx", "pt2"],
        default="onnx",
        help="onnx: standard ONNX operators, for ONNX Runtime, TensorRT, OpenVINO; pt2: a "
        "torch.export program, 'import mmsoftpool' before it is loaded (default: %(default)s)",
    )
    parser.add_argument("--backbone", action="store_true", help="export the backbone alone")
    parser.add_argument(
        "--out", help="file to write; defaults to the checkpoint's with the format's ending"
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    return parser


def main(args):

    cfg = engine.load_config(args.config, args.cfg_options)
    from mmsoftpool import export

    network = export.build_network(cfg, args.checkpoint, args.backbone)
    out = args.out or str(Path(args.checkpoint).with_suffix(f".{args.format}"))
    print(f"exporting to {out}; a ResNet-50 detector takes a minute or two")
    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # torch's exporters talk about themselves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        largest = export.export(network, args.format, out)
    size = Path(out).stat().st_size / 2**20
    print(f"wrote {out} ({size:.1f} MiB), largest difference from PyTorch {largest:.1e}")


if __name__ == "__main__":
    cli.run(main, make_parser())
