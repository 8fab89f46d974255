"""Tests the package with other versions of Python, torch, numpy and OpenMMLab's packages.

The operator's tests run in the rows with torch alone, two iterations of the demo in the others.
``make matrix``, or ``python scripts/matrix.py [ROW ...]`` where uv is installed. Each row has a
folder in ``build/matrix``, with a fresh environment into which uv installs wheels from the
registry; ``PIP_FIND_LINKS`` names folders with more. A row is skipped where a wheel or its Python
is unavailable. A row that passed is not run again, and its environment is deleted (each takes about
5 GB); to run it again, delete its folder. The table is printed and in ``build/matrix/table.md``.
"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"
#: Value and gradient against the definition, gradcheck, opcheck, torch.compile, torch.export and
#: torch.func, on the compiled library and on the reference.
TESTS = (
    "test_backends.py::test_the_compiled_library_is_what_runs",
    "test_raw_operator.py",
    "test_functional.py",
    "test_autograd.py",
    "test_pytorch.py",
)
ONEDL = ("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "pycocotools", "opencv-python")
UPSTREAM = ("mmengine", "mmdet", "opencv-python<4.12")

# torch 2.1's torch.utils.cpp_extension, which mmengine imports, needs pkg_resources.
OLD = ("torch==2.1.*", "numpy<2", "setuptools<70")


class Row(NamedTuple):
    """One environment.

    Attributes:
        name: Name of its folder.
        python: Version of Python.
        packages: What is installed beside pytest, as for pip.
        wheel: Name of an earlier row whose wheel is tested; the row builds its own by default.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    wheel: str = ""


ROWS = [
    Row("torch2.1", "3.10", OLD),
    Row("torch2.4", "3.11", ("torch==2.4.*", "numpy<2")),
    Row("torch2.4-numpy2", "3.12", ("torch==2.4.*", "numpy>=2"), "torch2.4"),
    Row("torch2.6", "3.13", ("torch==2.6.*", "numpy>=2")),
    Row("torch2.10", "3.10", ("torch==2.10.*", "numpy<2")),
    # One wheel fits every torch from 2.10 on.
    Row("torch2.10-wheel", "3.13", ("torch==2.10.*", "numpy>=2"), "torch2.10"),
    Row("torch2.13-wheel", "3.12", ("torch==2.13.*", "numpy>=2"), "torch2.10"),
    Row("newest-wheel", "3.12", ("torch", "numpy>=2"), "torch2.10"),
    Row("newest", "3.13", ("torch", "numpy>=2")),
    Row("onedl", "3.11", ("torch==2.13.*", "numpy>=2", *ONEDL), "torch2.10"),
    Row("onedl-numpy1", "3.11", ("torch==2.13.*", "numpy<2", *ONEDL), "torch2.10"),
    Row("onedl-newest", "3.13", ("torch", "numpy>=2", *ONEDL), "torch2.10"),
    Row("upstream-lite", "3.11", (*OLD, *UPSTREAM, "mmcv-lite==2.1.*"), "torch2.1"),
    Row("upstream", "3.11", (*OLD, *UPSTREAM, "mmcv==2.1.*"), "torch2.1"),
]

# mmdet imports all of mmcv's compiled operators, which mmcv-lite lacks; training calls none.
MISSING_OPERATORS = """
def __getattr__(name):
    def missing(*args, **kwargs):
        raise NotImplementedError(f"mmcv-lite lacks the operator {name}")

    return missing
"""


class Skip(Exception):
    """The environment of a row is unavailable; the message is the reason."""


class Failure(Exception):
    """A row's tests fail; the message says which."""


class Runner:
    """Runs the steps of one row; their output goes to ``log.txt`` in its folder."""

    def __init__(self, row):
        self.row = row
        self.folder = FOLDER / row.name
        self.python = self.folder / "venv" / "bin" / "python"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.log.unlink(missing_ok=True)

    def call(self, *command):
        """Runs a command in the row's folder; returns its exit status and its output."""
        with open(self.log, "a+") as log:
            print(f"\n$ {' '.join(map(str, command))}", file=log, flush=True)
            start = log.tell()
            status = subprocess.run(
                list(map(str, command)), cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            ).returncode
            log.seek(start)
            return status, log.read()

    def uv(self, *arguments):
        return self.call(sys.executable, "-m", "uv", *arguments)

    def install(self):
        """Creates the environment, or raises Skip with uv's reason."""
        row = self.row
        status, _ = self.uv("venv", "--allow-existing", "--python", row.python, "venv")
        if status:
            raise Skip(f"no Python {row.python}")
        packages = [*row.packages, "wheel", "pytest"]
        if not any(package.startswith("setuptools") for package in packages):
            packages.append("setuptools")
        install = ("pip", "install", "--python", self.python)
        # What is compiled comes as a wheel; onedl-mmdetection has none, and its build needs torch.
        for name in ("torch", "numpy", "mmcv", "onedl-mmcv"):
            install += ("--only-binary", name)
        openmmlab = [package for package in packages if "mm" in package]
        status, output = self.uv(*install, *(p for p in packages if p not in openmmlab))
        if not status and openmmlab:
            status, output = self.uv(*install, "--no-build-isolation", *packages)
        if status:
            text = " ".join(output.split())
            reason = re.search(r"Because (.*?)(?: and you require|,? we can conclude)", text)
            raise Skip(reason[1] if reason else output.strip().splitlines()[-1])

    def build(self):
        """Builds the wheel from a source distribution and installs it."""
        folder = FOLDER / (self.row.wheel or self.row.name) / "dist"
        if not self.row.wheel:
            shutil.rmtree(folder, ignore_errors=True)
            build = ("build", "--no-build-isolation", "--python", self.python, "-o", folder, ROOT)
            if self.uv(*build)[0]:
                raise Failure("does not build")
        wheels = list(folder.glob("*.whl"))
        if not wheels:
            raise Skip(f"the row {self.row.wheel} has built no wheel")
        install = ("pip", "install", "--no-deps", "--reinstall", "--python", self.python)
        if self.uv(*install, wheels[0])[0]:
            raise Failure("the wheel does not install")

    def test_operator(self):
        """Runs the tests of ``TESTS`` on the installed package; returns pytest's summary."""
        for name in ("ops", "__init__.py", "common.py", "conftest.py"):
            source, target = ROOT / "tests" / name, self.folder / "tests" / name
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
        tests = [f"tests/ops/{name}" for name in TESTS]
        status, output = self.call(
            *(self.python, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"),
            *("-k", "not onnx", *tests),
        )
        summary = re.sub(r" in .*|, \d+ (deselected|warnings?)|=", "", output.splitlines()[-1])
        if status:
            failed = re.findall(r"^FAILED \S+?::(\S+)", output, re.MULTILINE)
            raise Failure(f"{summary.strip()}: {', '.join(failed[:3]) or 'see its log.txt'}")
        return summary.strip()

    def run_demo(self):
        """Trains the demo for two iterations and, where mmcv has its operators, evaluates it."""
        lite = any(package.startswith("mmcv-lite") for package in self.row.packages)
        if lite:
            (mmcv,) = self.folder.glob("venv/lib/python*/site-packages/mmcv")
            (mmcv / "_ext.py").write_text(MISSING_OPERATORS)
        shutil.rmtree(self.folder / "work_dirs", ignore_errors=True)
        draw = ("make_shapes.py", "data/shapes", "--train", "32", "--val", "10")
        options = ["train_cfg.max_epochs=1", "default_hooks.logger.interval=1"]
        # Two iterations give no score above the demo's threshold; without detections no AP.
        options += ["model.test_cfg.score_thr=0"]
        options += ["train_cfg.val_begin=2"] if lite else []
        config = ROOT / "configs" / "demo_retinanet_softpool.py"
        train = ("train.py", config, "--cfg-options", *options)
        for tool, *arguments in (draw, train):
            status, output = self.call(self.python, ROOT / "tools" / tool, *arguments)
            if status:
                raise Failure(f"{tool}: {output.strip().splitlines()[-1]}")
        if "[2/2]" not in output or not (lite or "bbox_mAP" in output):
            raise Failure("the demo's training has no result, see log.txt")
        return "2 iterations" if lite else "2 iterations, evaluation"

    def versions(self):
        """Version of every installed package."""
        listing = ("pip", "list", "--quiet", "--format", "json", "--python", self.python)
        output = self.uv(*listing)[1]
        found = {entry["name"]: entry["version"] for entry in json.loads(output)}
        found["python"] = self.call(self.python, "--version")[1].split()[1]
        return found


def run_row(row):
    """Runs one row; returns its result, a dict that ``table`` reads."""
    runner = Runner(row)
    result = {"date": str(datetime.date.today()), "versions": {}, "operator": "", "demo": ""}
    steps = [("installing", runner.install, None), ("building", runner.build, None)]
    if any("mmdet" in package for package in row.packages):
        steps.append(("running the demo", runner.run_demo, "demo"))
    else:
        steps.append(("testing the operator", runner.test_operator, "operator"))
    try:
        for title, step, column in steps:
            start = time.monotonic()
            print(f"   {title} ", end="", flush=True)
            outcome = step()
            print(f"({time.monotonic() - start:.0f} s) {outcome or ''}", flush=True)
            if step == runner.install:
                result["versions"] = runner.versions()
            if column:
                result[column] = outcome
        result["passed"] = True
    except (Skip, Failure) as error:
        kind = "skipped" if isinstance(error, Skip) else "fails"
        result[column or steps[-1][2]] = f"{kind}: {error}"
        print(f"- {kind}: {error}", flush=True)
    if "fails" not in result["operator"] + result["demo"]:
        shutil.rmtree(runner.folder / "venv", ignore_errors=True)
    return result


def read_result(row):
    path = FOLDER / row.name / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def requested(row, name):
    """The version of a package that a row asks for, for rows that were not installed."""
    wanted = [package for package in row.packages if re.split("[=<>]", package)[0] == name]
    return wanted[0].removeprefix(name).removeprefix("==") or "newest" if wanted else ""


def table():
    """The results as Markdown."""
    lines = [
        "| torch | Python | numpy | OpenMMLab | operator | demo |",
        "|---|---|---|---|---|---|",
    ]
    dates = set()
    for row in ROWS:
        result = read_result(row)
        versions = result.get("versions", {})
        dates |= {result["date"]} if result else set()
        openmmlab = [
            f"{name} {versions.get(name) or requested(row, name)}"
            for name in (re.split("[=<>]", package)[0] for package in row.packages)
            if "mm" in name
        ]
        built = f" (wheel of {row.wheel})" if row.wheel and result.get("passed") else ""
        operator = result.get("operator", "not run")
        cells = [
            versions.get("torch") or requested(row, "torch"),
            versions.get("python") or row.python,
            versions.get("numpy") or requested(row, "numpy"),
            ", ".join(openmmlab),
            operator and operator + built,
            result.get("demo", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    days = " to ".join(sorted({min(dates), max(dates)})) if dates else "no day"
    return "\n".join([*lines, "", f"Run on {days}."])


def main(names):
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        sys.exit(f"unknown rows {sorted(unknown)}; the rows are {[row.name for row in ROWS]}")
    # uv reads neither pip's variable nor pyenv's list of Pythons.
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ.get("PIP_FIND_LINKS", "").split()))
    if shutil.which("pyenv"):
        bare = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
        os.environ.setdefault("PYENV_VERSION", ":".join(reversed(bare.stdout.split())))
    # The package comes from the environment, and the GPU, if there is one, has its own tests.
    os.environ.pop("PYTHONPATH", None)
    # Optimisation triples the time of a build, and torch's headers do not depend on it.
    os.environ.update(MMSOFTPOOL_CUDA="0", CXXFLAGS="-O1", CUDA_VISIBLE_DEVICES="")
    rows = [row for row in ROWS if not names or row.name in names]
    for number, row in enumerate(rows, 1):
        print(f"[{number}/{len(rows)}] {row.name}: Python {row.python}, {' '.join(row.packages)}")
        result = read_result(row)
        if result.get("passed"):
            print(f"   passed on {result['date']}")
            continue
        result = run_row(row)
        (FOLDER / row.name / "result.json").write_text(json.dumps(result, indent=1))
    (FOLDER / "table.md").write_text(table() + "\n")
    print("\n" + table())
    sys.exit(any("fails" in str(read_result(row)) for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
