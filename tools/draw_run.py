#!/usr/bin/env python
"""Draws a run: WORK_DIR/curves.png, and WORK_DIR/detections.png from the file of test.py --out.

Example: python tools/draw_run.py configs/demo_retinanet_softpool.py \\
             --predictions work_dirs/demo_retinanet_softpool/predictions.pkl
"""

import argparse
from pathlib import Path

from mmengine.fileio import load

from mmsoftpool import apis, visualization


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("--predictions", metavar="FILE.pkl", help="what test.py --out wrote")
    apis.add_common_arguments(parser)
    args = parser.parse_args()
    cfg = apis.load_config(args.config, args.cfg_options, args.work_dir)
    work_dir = Path(cfg.work_dir)
    try:
        visualization.plot_curves(work_dir, work_dir / "curves.png")
        print(f"drew {work_dir / 'curves.png'}")
        if args.predictions:
            dataset = cfg.test_dataloader.dataset
            ann_file = Path(dataset.get("data_root") or "", dataset.ann_file)
            visualization.draw_detections(
                load(args.predictions), ann_file, work_dir / "detections.png"
            )
            print(f"drew {work_dir / 'detections.png'}")
    except FileNotFoundError as error:
        raise apis.UserError(str(error)) from error


if __name__ == "__main__":
    apis.run_tool(main)
