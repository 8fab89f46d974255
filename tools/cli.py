"""Functions shared by the tools: errors in one line, common arguments.

Beside the tools and outside of the package, so that a tool parses its arguments, and prints its
help, before it imports mmsoftpool and with it torch and MMDetection.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parses the command line and runs ``main`` with it.

    Two kinds of error end the process with one line on stderr and exit status 2, because the user
    can correct their cause: a ValueError or TypeError that a ``raise`` statement of mmsoftpool or
    of the tool's folder raises, and any OSError. Every other exception, such as a ValueError that
    torch raises, is a bug and keeps its traceback.

    Args:
        main: Takes the parsed arguments.
        parser: The parser of the tool.
    """
    try:
        main(parser.parse_args())
    except (ValueError, TypeError, OSError) as error:
        if not isinstance(error, OSError) and not _is_raised_here(error, main):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _is_raised_here(error: Exception, main: Callable) -> bool:
    """Whether a ``raise`` statement of mmsoftpool, or of the folder of ``main``, raised an error.

    The line matters too: a function in C, such as ``int()``, has no frame of its own, so the
    innermost frame of its error is that of the caller.
    """
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    package = sys.modules.get("mmsoftpool")  # without it, none of its errors either
    ours = package and Path(innermost.filename).is_relative_to(Path(package.__file__).parent)
    tool = Path(innermost.filename).parent == Path(main.__code__.co_filename).parent
    return (ours or tool) and innermost.line.startswith("raise ")


def make_parser(description: str) -> argparse.ArgumentParser:
    """Makes a parser whose help shows the docstring of a tool with its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
        'is given as key="[a,b]" or key=a,b. data_root=DIR replaces the data root of all data sets '
        "and evaluators",
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that training and testing share, with MMDetection's names."""
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="the folder to save logs and results (default: work_dir of the config, or "
        "work_dirs/ and the name of the config)",
    )
    add_cfg_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="the launcher that started the processes of a distributed run (default: %(default)s)",
    )
    # torchrun's predecessor passes it; torchrun itself sets LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a training, with MMDetection's names."""
    parser.add_argument(
        "--amp", action="store_true", help="enable automatic mixed precision training; needs a GPU"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the true batch size / auto_scale_lr.base_batch_size",
    )
