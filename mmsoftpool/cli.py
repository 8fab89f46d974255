"""What the command lines in ``tools/`` share: common arguments, errors in one line."""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mmengine.config import DictAction


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parses the command line and runs ``main`` with it.

    Errors in what the user gave end the process with one line and exit status 2: those that this
    package raises itself about its arguments (ValueError and TypeError), and those of the operating
    system (OSError), which name the file. Every other exception is a bug and keeps its traceback.
    """
    try:
        main(parser.parse_args())
    except (ValueError, TypeError, OSError) as error:
        if not isinstance(error, OSError) and not _raised_here(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume resumes a training run", file=sys.stderr)
        sys.exit(130)


def _raised_here(error: Exception) -> bool:
    """Whether the frame that raised is of this package or one of its tools."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    package = Path(__file__).parent
    return Path(innermost).is_relative_to(package) or innermost == sys.argv[0]


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows a tool's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what training and testing have in common, with MMDetection's names."""
    parser.add_argument(
        "--work-dir",
        help="where logs and results go; defaults to work_dir of the config, else work_dirs/CONFIG",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="override settings of the config, for example train_dataloader.batch_size=4; lists as "
        "key='[a,b]' or key=a,b. data_root=DIR moves all data sets and evaluators",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes of a distributed run were started (default: %(default)s)",
    )
    # torchrun's predecessor passes it; torchrun itself sets LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a run is trained, with MMDetection's names."""
    parser.add_argument("--amp", action="store_true", help="train in mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by true batch size / auto_scale_lr.base_batch_size",
    )
