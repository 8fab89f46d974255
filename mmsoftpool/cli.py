"""The command ``mmsoftpool``, with a subcommand for each thing that a user does.

Also what every script of the project shares: errors in one line, and common arguments. A command
imports mmdet's models, which takes seconds, after it has read the config: a mistyped name is told
at once.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import UserError


def run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs a command with its parsed arguments.

    A number that ``main`` returns is the exit status. A UserError or an OSError, whose cause the
    user can correct, ends the process with one line on stderr and exit status 2. Every other
    exception is a bug and keeps its traceback.
    """
    try:
        sys.exit(main(args) or 0)
    except (UserError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def make_parser(description: str, **options) -> argparse.ArgumentParser:
    """Makes a parser whose help shows a description with its line breaks."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``, MMDetection's way to override settings of a config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override settings of the config, for example train_dataloader.batch_size=4. A list "
        'is given as key="[a,b]" or key=a,b; a value with a slash is a path and taken literally. '
        "data_root=DIR replaces the data root of all data sets and evaluators",
    )


def _add_number(parser: argparse.ArgumentParser, name: str, default: float, help: str, **options):
    """Adds an option that takes a number, an int or a float as its default is."""
    help += " (default: %(default)s)"
    parser.add_argument(name, type=type(default), default=default, help=help, **options)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that training and testing share, with MMDetection's names."""
    add = parser.add_argument
    add(
        "--work-dir",
        metavar="DIR",
        help="the folder for logs and results (default: work_dir of the config, or work_dirs/ and "
        "the name of the config)",
    )
    add_cfg_options(parser)
    add(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="the launcher that started the processes of a distributed run (default: %(default)s)",
    )
    # torchrun's predecessor passes it; torchrun itself sets LOCAL_RANK.
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a training, with MMDetection's names."""
    add = parser.add_argument
    add("--amp", action="store_true", help="enable automatic mixed precision training; needs a GPU")
    add(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the true batch size / auto_scale_lr.base_batch_size",
    )


def _train_arguments(parser):
    parser.add_argument("config", help="the config file")
    _add_train_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="resume from CHECKPOINT or, if no file is given, from the latest intact "
        "checkpoint in the work dir; without one, a new run starts",
    )
    _add_run_arguments(parser)


def _train(args):
    """Train a detector from a config, as MMDetection's tools/train.py does.

    CONFIG is a file or the name of a config of this package.

    Example: mmsoftpool train retinanet_r50_softpool --cfg-options data_root=/data/coco
    """
    from .config import load_config

    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    from .runner import train

    train(cfg, args.amp, args.auto_scale_lr, args.resume)


def _test_arguments(parser):
    add = parser.add_argument
    add("config", help="the config file")
    add("checkpoint", help="the checkpoint file or its URL")
    add("--out", metavar="FILE.pkl", help="save the predictions to this pickle file")
    add("--show", action="store_true", help="show the predictions in a window")
    pictures = "save pictures of the predictions and the ground truth to this folder"
    add("--show-dir", metavar="DIR", help=pictures)
    time = "the time that each window is shown, in seconds"
    _add_number(parser, "--wait-time", 2.0, time, metavar="SECONDS")
    _add_run_arguments(parser)


def _test(args):
    """Evaluate a detector from a config and a checkpoint, as MMDetection's tools/test.py does.

    Example: mmsoftpool test retinanet_r50_softpool \\
                 work_dirs/retinanet_r50_softpool/epoch_12.pth --show-dir pictures
    """
    from .config import load_config

    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    from .runner import evaluate

    evaluate(cfg, args.checkpoint, args.out, args.show, args.show_dir, args.wait_time)


def _test_dev_arguments(parser):
    add = parser.add_argument
    add("config", nargs="?", help="the config file")
    add("checkpoint", nargs="?", help="the checkpoint file or its URL")
    add("--check", metavar="FILE", help="only check this submission, a .json or .zip file")
    add("--name", help="the name of the algorithm in the file names (default: the config's name)")
    add(
        "--ann-file",
        metavar="FILE.json",
        help="the list of the images (default: annotations/image_info_test-dev2017.json in "
        "the data root)",
    )
    images = "the folder with the images (default: test2017/ in the data root)"
    add("--image-dir", metavar="DIR", help=images)
    parts = "save the results after every N images"
    _add_number(parser, "--part-size", 500, parts, metavar="N")
    empty = "with --check, accept up to N images without a detection"
    _add_number(parser, "--max-empty", 0, empty, metavar="N")
    _add_run_arguments(parser)


def _test_dev(args):
    """Run a detector on COCO test-dev and write the zip files for the COCO server.

    The submission is WORK_DIR/test-dev/bbox/detections_test-dev2017_NAME_results.zip, and, for a
    detector with masks, the same file in segm/. Every file is checked after it is written. The same
    command resumes an interrupted run. With --check, a finished file is checked, and nothing else.

    Examples:
      mmsoftpool test-dev retinanet_r50_softpool work_dirs/retinanet_r50_softpool/epoch_12.pth
      mmsoftpool test-dev --check detections_test-dev2017_softpool_results.zip
    """
    from .config import load_config, require

    if not args.check and not (args.config and args.checkpoint):
        raise UserError("give a config and a checkpoint, or a file to check")
    data_root = "data/coco"
    if args.config:
        cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
        require(cfg, "test_dataloader.dataset")
        data_root = cfg.test_dataloader.dataset.get("data_root") or data_root
    from .evaluation.submission import check_submission, detect_test_dev

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


def _compare_arguments(parser):
    add = parser.add_argument
    add("ann_file", help="the annotations in COCO's format, such as instances_val2017.json")
    files = dict(nargs="+", required=True, metavar="FILE.json")
    add("--a", help="the result files of model A, one for each run", **files)
    add("--b", help="the result files of model B, one for each run", **files)
    add(
        "--names",
        nargs=2,
        default=["A", "B"],
        metavar=("A", "B"),
        help="the names of the models in the table (default: A B)",
    )
    classes = "the classes that the detectors know (default: all categories of ANN_FILE)"
    add("--classes", nargs="+", metavar="NAME", help=classes)
    add(
        "--iou-type",
        choices=["bbox", "segm"],
        default="bbox",
        help="compare boxes or masks (default: %(default)s)",
    )
    _add_number(parser, "--confidence", 0.95, "the confidence of the intervals, between 0 and 1")
    _add_number(parser, "--seed", 0, "the seed of the bootstrap")
    _add_resamples(parser)
    add("--markdown", metavar="FILE.md", help="save the table to this file as well")
    add("--plot", metavar="FILE.png", help="save a picture of the differences to this file")


def _compare(args):
    """Compare two detectors on the same images.

    COCO's six metrics as in Table 8 of the paper, every difference with a confidence interval from
    a paired bootstrap. The result files are those that CocoMetric writes with outfile_prefix;
    several files of a model are its runs with several seeds.

    Example:
      mmsoftpool compare data/coco/annotations/instances_val2017.json \\
          --a maxpool.bbox.json --b softpool.bbox.json --markdown table.md --plot table.png
    """
    from .evaluation.comparison import compare_detections
    from .files import check_output, write_text
    from .pictures import check_picture

    if args.markdown:
        check_output(args.markdown)
    if args.plot:
        check_picture(args.plot)
    if args.names[0] == args.names[1]:
        raise UserError(f"names must be different, got {args.names[0]} twice")
    comparison = compare_detections(
        args.ann_file,
        dict(zip(args.names, (args.a, args.b), strict=True)),
        classes=args.classes,
        iou_type=args.iou_type,
        resamples=args.resamples,
        confidence=args.confidence,
        seed=args.seed,
    )
    print(comparison.markdown(), end="")
    if args.markdown:
        write_text(args.markdown, comparison.markdown())
    if args.plot:
        comparison.plot(args.plot)


def _add_resamples(parser: argparse.ArgumentParser) -> None:
    samples = "the number of bootstrap samples of the comparison"
    _add_number(parser, "--resamples", 1000, samples, metavar="N")


def _ab_arguments(parser):
    add = parser.add_argument
    add("baseline", help="the config file that the others are compared with")
    compared = "a config file to compare with the baseline"
    add("configs", nargs="+", metavar="CONFIG", help=compared)
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="the seeds of the runs of each config (default: 0 1 2)",
    )
    add(
        "--work-dir",
        metavar="DIR",
        help="the folder for all runs and results (default: work_dirs/BASELINE_vs_CONFIG, or "
        "work_dirs/BASELINE_vs_N_others for more than one CONFIG)",
    )
    add(
        "--names",
        nargs="+",
        metavar="NAME",
        help="the names of all configs in tables and pictures, the baseline's first (default: "
        "those of the files)",
    )
    add_cfg_options(parser)
    _add_number(parser, "--gpus", 1, "the number of GPUs of a run", metavar="N")
    _add_train_arguments(parser)
    _add_resamples(parser)


def _ab(args):
    """Train and evaluate configs with the same seeds, and compare each with the first one.

    The result is the table of mmsoftpool compare. The same command skips finished runs and resumes
    interrupted ones; more seeds and more configs can be added later.

    Examples:
      mmsoftpool ab demo_retinanet_maxpool demo_retinanet_softpool --seeds 0 1 2 3 4
      mmsoftpool ab maxpool.py softpool.py alpha_2.py alpha_4.py --work-dir work_dirs/alpha
    """
    from .evaluation.ab import compare_configs

    baseline, *others = (Path(config).stem for config in (args.baseline, *args.configs))
    compared = others[0] if len(others) == 1 else f"{len(others)}_others"
    work_dir = args.work_dir or Path("work_dirs", f"{baseline}_vs_{compared}")
    comparisons = compare_configs(
        [args.baseline, *args.configs],
        args.seeds,
        work_dir,
        cfg_options=args.cfg_options,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        gpus=args.gpus,
        resamples=args.resamples,
        names=args.names,
    )
    for metric, comparison in comparisons.items():
        print(f"\n{metric}\n\n{comparison.markdown()}")
    print(f"The tables and pictures are in {work_dir}.")


def _add_include(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include",
        nargs="+",
        default="torch.nn.MaxPool2d",
        metavar="NAME",
        help="the pools of the backbone to replace: classes such as torch.nn.AvgPool2d, or "
        "names in which * and ? are wildcards (default: %(default)s)",
    )


def _swap_arguments(parser):
    add = parser.add_argument
    add("config", help="the config file of the training")
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint file or its URL")
    alphas = "the values of alpha (default: 0 0.5 1 2 4 8 16 32 64)"
    add("--alphas", nargs="+", type=float, metavar="A", help=alphas)
    _add_include(parser)
    add(
        "--batch-norm",
        type=int,
        default=0,
        metavar="N",
        help="draw a second curve, with the statistics of batch norm estimated anew from N "
        "training batches after each swap (default: no second curve)",
    )
    results = "the folder for swap.md, swap.png and swap.json (default: work_dirs/CONFIG_swap)"
    add("--work-dir", metavar="DIR", help=results)
    add_cfg_options(parser)


def _swap(args):
    """Evaluate a max-pool checkpoint with SoftPool swapped in, without training it.

    Prints and draws the score on the val split for each sharpness alpha, to choose one for a
    checkpoint that exists. The config is that of the training; several checkpoints of it are
    averaged. The same command resumes after an interruption.

    Examples:
      mmsoftpool swap demo_retinanet_maxpool work_dirs/demo_retinanet_maxpool/epoch_16.pth \\
          --batch-norm 50
      mim download onedl-mmdetection --config retinanet_r50_fpn_1x_coco --dest .
      mmsoftpool swap retinanet_r50_fpn_1x_coco.py retinanet_r50_fpn_1x_coco_*.pth
    """
    from .config import load_config

    work_dir = args.work_dir or f"work_dirs/{Path(args.config).stem}_swap"
    cfg = load_config(args.config, args.cfg_options, work_dir)
    from .evaluation.swap import ALPHAS, evaluate_swap

    swap = evaluate_swap(
        cfg,
        args.checkpoints,
        args.alphas or ALPHAS,
        include=args.include,
        batch_norm=args.batch_norm,
    )
    print(f"\n{swap.markdown()}\nThe table and the picture are in {work_dir}.")


def _robustness_arguments(parser):
    parser.add_argument("config", help="the config file of the training")
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="its checkpoint files or their URLs"
    )
    parser.add_argument(
        "--also",
        nargs="+",
        action="append",
        default=[],
        metavar="FILE",
        help="another config and its checkpoints; may be given several times",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="the names of the detectors in the table (default: those of the configs)",
    )
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=float,
        default=[],
        metavar="A",
        help="evaluate each detector with these values of alpha as well, without training: its "
        "SoftPool gets another alpha or, where it has none, takes the place of other pools "
        "(default: none)",
    )
    _add_include(parser)
    parser.add_argument(
        "--corruptions", nargs="+", metavar="NAME", help="the corruptions (default: all 15)"
    )
    parser.add_argument(
        "--severities",
        nargs="+",
        type=int,
        metavar="N",
        help="the severities, from 1 to 5 (default: 1 2 3 4 5)",
    )
    parser.add_argument(
        "--remedies",
        nargs="+",
        default=["none"],
        metavar="NAME",
        help="evaluate after each of these filters of the images: none, gaussian (sigma 1.5) or "
        "median (3 x 3) (default: none)",
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="the folder for robustness.md, robustness.png, with --alphas robustness_alphas.png, "
        "and robustness.json (default: work_dirs/CONFIG_robustness)",
    )
    add_cfg_options(parser)


def _robustness(args):
    """Evaluate detectors on corrupted images: noise, blur, weather and digital corruptions.

    Prints and draws the score on the val split for 15 corruptions of 5 severities, as in Michaelis
    et al. (2019), with the mean over all (mPC) and its percentage of the clean score (rPC). Several
    checkpoints of a config are averaged. The same command resumes after an interruption. Needs
    the package imagecorruptions-imaug.

    Examples:
      mmsoftpool robustness demo_retinanet_maxpool max/epoch_16.pth \\
          --also demo_retinanet_softpool soft/epoch_16.pth --severities 3
      mmsoftpool robustness demo_retinanet_softpool epoch_16.pth --alphas 0.5 2 4 \\
          --corruptions gaussian_noise defocus_blur
    """
    from .config import config_names, load_config

    work_dir = args.work_dir or f"work_dirs/{Path(args.config).stem}_robustness"
    files = [[args.config, *args.checkpoints], *args.also]
    names = config_names([config for config, *_ in files], args.names)
    detectors = {
        name: (load_config(config, args.cfg_options, work_dir), checkpoints)
        for name, (config, *checkpoints) in zip(names, files, strict=True)
    }
    from .evaluation.robustness import CORRUPTIONS, SEVERITIES, evaluate_robustness

    robustness = evaluate_robustness(
        detectors,
        work_dir,
        alphas=args.alphas,
        corruptions=args.corruptions or CORRUPTIONS,
        severities=args.severities or SEVERITIES,
        remedies=args.remedies,
        include=args.include,
    )
    print(f"\n{robustness.markdown()}\nThe table and the picture are in {work_dir}.")


def _export_arguments(parser):
    add = parser.add_argument
    add("config", help="the config file")
    add("checkpoint", help="the checkpoint file")
    add(
        "--format",
        choices=["onnx", "pt2"],
        default="onnx",
        help="onnx: standard ONNX operators for ONNX Runtime and OpenVINO; pt2: a "
        "torch.export program, which needs 'import mmsoftpool' before it is loaded (default: "
        "%(default)s)",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--backbone", action="store_true", help="export only the backbone")
    part.add_argument(
        "--with-nms",
        action="store_true",
        help="export the whole detector, from the pixels of an image to the boxes after NMS",
    )
    out = "the file to write (default: the checkpoint's name with the suffix of the format)"
    add("--out", metavar="FILE", help=out)
    add_cfg_options(parser)


def _export(args):
    """Export a detector as ONNX or as a torch.export program, for any batch and image size.

    The exported network goes from the normalised image to the raw outputs of the head, before
    anchors and NMS; of a two-stage detector, to the features of the neck and the outputs of the
    RPN. With --with-nms it goes from the resized image to the boxes. The file is compared with
    PyTorch before it is kept.

    Examples:
      mmsoftpool export retinanet_r50_softpool epoch_12.pth --format onnx
      mmsoftpool export retinanet_r50_softpool epoch_12.pth --with-nms --out detector.onnx
    """
    import logging
    import warnings

    from .config import load_config
    from .files import check_output

    out = args.out or str(Path(args.checkpoint).with_suffix(f".{args.format}"))
    check_output(out)
    cfg = load_config(args.config, args.cfg_options)
    from .export import build_network, export

    network = build_network(cfg, args.checkpoint, args.backbone, args.with_nms)
    print(f"exporting to {out}; a ResNet-50 detector takes a minute or two")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        largest = export(network, args.format, out)
    size = Path(out).stat().st_size / 2**20
    print(f"wrote {out} ({size:.1f} MiB), largest difference from PyTorch {largest:.1e}")


def _convert_arguments(parser):
    add = parser.add_argument
    add("source", metavar="IN", help="the authors' checkpoint")
    add("target", metavar="OUT", help="the file to write, with only the weights")
    add(
        "--arch",
        metavar="ARCH",
        help="the architecture, if it is not in the checkpoint: torchvision's name, such as "
        "resnet50, resnext101_32x4d or densenet121",
    )
    add(
        "--windows",
        choices=["shifted", "aligned"],
        default="shifted",
        help="the 2x2 windows that the weights were trained with: shifted, [2p-1, 2p], which "
        "the authors had before April 2022, or aligned, [2p, 2p+1], since then (default: "
        "%(default)s)",
    )
    trust = "execute code that the checkpoint may contain; only for files from people you trust"
    add("--trust", action="store_true", help=trust)


def _convert(args):
    """Convert an ImageNet checkpoint of the SoftPool authors and print the config lines to use it.

    Example: mmsoftpool convert resnet50.pth.tar resnet50_softpool.pth
    """
    from .convert import convert_checkpoint

    lines = convert_checkpoint(args.source, args.target, args.arch, args.windows, args.trust)
    print(f"wrote {args.target}; a detector's config starts from it with\n\n{lines}", end="")


def _doctor(args):
    """Diagnose the environment, suggest fixes, and test the operator against float64.

    A bug report should contain the output.

    Example: mmsoftpool doctor
    """
    from .environment import doctor

    return doctor()


COMMANDS = {
    "doctor": (_doctor, lambda parser: None),
    "train": (_train, _train_arguments),
    "test": (_test, _test_arguments),
    "test-dev": (_test_dev, _test_dev_arguments),
    "compare": (_compare, _compare_arguments),
    "ab": (_ab, _ab_arguments),
    "swap": (_swap, _swap_arguments),
    "robustness": (_robustness, _robustness_arguments),
    "export": (_export, _export_arguments),
    "convert": (_convert, _convert_arguments),
}


def make_command_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command, with those of its subcommands."""
    parser = make_parser("SoftPool for MMDetection.", prog="mmsoftpool")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (command, add_arguments) in COMMANDS.items():
        text = inspect.cleandoc(command.__doc__)
        subparser = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command ``mmsoftpool`` with ``argv`` or, by default, the process's arguments."""
    args = make_command_parser().parse_args(argv)
    run(COMMANDS[args.command][0], args)
