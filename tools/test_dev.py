#!/usr/bin/env python
"""Runs a detector on COCO test-dev and writes the zip files for the COCO server.

The submission is WORK_DIR/test-dev/bbox/detections_test-dev2017_NAME_results.zip, and, for a
detector with masks, the same file in segm/. Every file is checked after it is written. The same
command resumes an interrupted run. With --check, the tool only checks a finished file.

Examples:
  python tools/test_dev.py configs/retinanet_r50_softpool.py \\
      work_dirs/retinanet_r50_softpool/epoch_12.pth
  python tools/test_dev.py --check detections_test-dev2017_softpool_results.zip
"""

from pathlib import Path

import cli


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("config", nargs="?", help="the config file")
    parser.add_argument("checkpoint", nargs="?", help="the checkpoint file or its URL")
    parser.add_argument(
        "--check", metavar="FILE", help="only check this submission, a .json or .zip file"
    )
    parser.add_argument(
        "--name", help="the name of the algorithm in the file names (default: the config's name)"
    )
    parser.add_argument(
        "--ann-file",
        metavar="FILE.json",
        help="the list of the images (default: annotations/image_info_test-dev2017.json in the "
        "data root)",
    )
    parser.add_argument(
        "--image-dir",
        metavar="DIR",
        help="the folder with the images (default: test2017/ in the data root)",
    )
    parser.add_argument(
        "--part-size",
        type=int,
        default=500,
        metavar="N",
        help="save the results after every N images (default: %(default)s)",
    )
    parser.add_argument(
        "--max-empty",
        type=int,
        default=0,
        metavar="N",
        help="with --check, accept up to N images without a detection (default: %(default)s)",
    )
    cli.add_common_arguments(parser)
    return parser


def main(args):
    from mmsoftpool import engine
    from mmsoftpool.evaluation.submission import check_submission, detect_test_dev

    if not args.check and not (args.config and args.checkpoint):
        raise ValueError("give a config and a checkpoint, or a file to check")
    data_root = "data/coco"
    if args.config:
        cfg = engine.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
        engine.require(cfg, "test_dataloader.dataset")
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
