#!/usr/bin/env python
"""Exports a detector as ONNX or as a torch.export program, for any batch and image size.

The exported network goes from the normalised image to the raw outputs of the head, before anchors
and NMS; of a two-stage detector, to the features of the neck and the outputs of the RPN. The tool
compares the file with PyTorch before it keeps it.

Example: python tools/export.py configs/retinanet_r50_softpool.py epoch_12.pth --format onnx
"""

from pathlib import Path

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", help="the config file")
    parser.add_argument("checkpoint", help="the checkpoint file")
    parser.add_argument(
        "--format",
        choices=["onnx", "pt2"],
        default="onnx",
        help="onnx: standard ONNX operators for ONNX Runtime, TensorRT and OpenVINO; pt2: a "
        "torch.export program, which needs 'import mmsoftpool' before it is loaded (default: "
        "%(default)s)",
    )
    parser.add_argument("--backbone", action="store_true", help="export only the backbone")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the file to write (default: the checkpoint's name with the suffix of the format)",
    )
    cli.add_cfg_options(parser)
    return parser


def main(args):
    import logging
    import warnings

    from mmsoftpool import engine, export
    from mmsoftpool.files import check_output

    out = args.out or str(Path(args.checkpoint).with_suffix(f".{args.format}"))
    check_output(out)
    cfg = engine.load_config(args.config, args.cfg_options)
    network = export.build_network(cfg, args.checkpoint, args.backbone)
    print(f"exporting to {out}; a ResNet-50 detector takes a minute or two")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        largest = export.export(network, args.format, out)
    size = Path(out).stat().st_size / 2**20
    print(f"wrote {out} ({size:.1f} MiB), largest difference from PyTorch {largest:.1e}")


if __name__ == "__main__":
    cli.run(main, make_parser())
