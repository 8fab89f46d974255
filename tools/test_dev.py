#!/usr/bin/env python
"""Runs a detector on COCO test-dev and writes the zip files that the COCO server takes.

WORK_DIR/test-dev/bbox/detections_test-dev2017_NAME_results.json and .zip, and for a detector with
masks the same in segm/, are checked before it says done. An interrupted run goes on where it
stopped. With --check, only a finished file is checked.

Example: python tools/test_dev.py configs/retinanet_r50_softpool.py \\
             work_dirs/retinanet_r50_softpool/epoch_12.pth
         python tools/test_dev.py --check detections_test-dev2017_softpool_results.zip
"""

from pathlib import Path

from mmsoftpool import cli, engine
from mmsoftpool.evaluation.submission import check_submission, detect_test_dev


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", nargs="?", help="config file")
    parser.add_argument("checkpoint", nargs="?", help="checkpoint file or URL")
    parser.add_argument("--check", metavar="FILE", help="check this .json or .zip and do no more")
    parser.add_argument(
        "--name", help="of the algorithm, in the file names (default: the config's)"
    )
    parser.add_argument(
        "--ann-file",
        help="image_info_test-dev2017.json (default: the one in annotations/ of the data root)",
    )
    parser.add_argument(
        "--image-dir", help="folder with its images (default: test2017/ in the data root)"
    )
    parser.add_argument(
        "--part-size",
        type=int,
        default=500,
        metavar="N",
        help="images after which results are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--max-empty",
        type=int,
        default=0,
        metavar="N",
        help="for --check: images that may be without a detection (default: %(default)s)",
    )
    cli.add_common_arguments(parser)
    return parser


def main(args):
    if not args.check and not (args.config and args.checkpoint):
        raise ValueError("give a config and a checkpoint, or --check FILE")
    data_root = "data/coco"
    if args.config:
        cfg = engine.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
        data_root = cfg.test_dataloader.dataset.get("data_root") or data_root
    ann_file = args.ann_file or Path(data_root, "annotations", "image_info_test-dev2017.json")
    if args.check:
        print(check_submission(args.check, ann_file, args.max_empty))
        return
    submissions = detect_test_dev(
        cfg,
        args.checkpoint,
        args.name or Path(args.config).stem,
        ann_file,
        args.image_dir or Path(data_root, "test2017"),
        args.part_size,
    )
    for metric, path in submissions.items():
        print(f"upload for {metric}: {path}")


if __name__ == "__main__":
    cli.run(main, make_parser())
