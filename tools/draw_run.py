#!/usr/bin/env python
"""Draws a training run: its loss and AP to WORK_DIR/curves.png and, with --predictions, detections
beside the ground truth to WORK_DIR/detections.png.

Example: python tools/draw_run.py configs/demo_retinanet_softpool.py \\
             --predictions work_dirs/demo_retinanet_softpool/predictions.pkl
"""

from pathlib import Path

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", help="the config file of the run")
    parser.add_argument(
        "--predictions", metavar="FILE.pkl", help="the predictions that tools/test.py --out saved"
    )
    cli.add_common_arguments(parser)
    return parser


def main(args):
    from mmsoftpool import engine
    from mmsoftpool.files import read_pickle
    from mmsoftpool.visualization import run as visualization

    cfg = engine.load_config(args.config, args.cfg_options, args.work_dir)
    work_dir = Path(cfg.work_dir)
    visualization.plot_curves(work_dir, work_dir / "curves.png")
    print(f"drew {work_dir / 'curves.png'}")
    if args.predictions:
        dataset = cfg.test_dataloader.dataset
        ann_file = Path(dataset.get("data_root") or "", dataset.ann_file)
        visualization.draw_detections(
            read_pickle(args.predictions, "prediction file"), ann_file, work_dir / "detections.png"
        )
        print(f"drew {work_dir / 'detections.png'}")


if __name__ == "__main__":
    cli.run(main, make_parser())
