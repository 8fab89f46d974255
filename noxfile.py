"""Tests the package with other versions of Python, torch, numpy and OpenMMLab's packages.

The operator's tests run in the sessions without OpenMMLab, two iterations of the demo in the
others. ``make matrix``, or ``nox -s onedl`` for one of them. uv installs wheels from the registry;
``PIP_FIND_LINKS`` names folders with more. A session is skipped where a wheel or its Python is
unavailable. ``build/matrix/table.md`` has a line for each that passed.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nox

ROOT = Path(__file__).parent
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
#: By name: Python; what is installed, as for pip; the session whose wheel is tested, which fits
#: every torch from 2.10 on (without one, the session builds its own).
SESSIONS = {
    "torch2.1": ("3.10", OLD, None),
    "torch2.4": ("3.11", ("torch==2.4.*", "numpy<2"), None),
    "torch2.4-numpy2": ("3.12", ("torch==2.4.*", "numpy>=2"), "torch2.4"),
    "torch2.6": ("3.13", ("torch==2.6.*", "numpy>=2"), None),
    "torch2.10": ("3.10", ("torch==2.10.*", "numpy<2"), None),
    "torch2.10-wheel": ("3.13", ("torch==2.10.*", "numpy>=2"), "torch2.10"),
    "torch2.13-wheel": ("3.12", ("torch==2.13.*", "numpy>=2"), "torch2.10"),
    "newest-wheel": ("3.12", ("torch", "numpy>=2"), "torch2.10"),
    "newest": ("3.13", ("torch", "numpy>=2"), None),
    "onedl": ("3.11", ("torch==2.13.*", "numpy>=2", *ONEDL), "torch2.10"),
    "onedl-numpy1": ("3.11", ("torch==2.13.*", "numpy<2", *ONEDL), "torch2.10"),
    "onedl-newest": ("3.13", ("torch", "numpy>=2", *ONEDL), "torch2.10"),
    "upstream-lite": ("3.11", (*OLD, *UPSTREAM, "mmcv-lite==2.1.*"), "torch2.1"),
    "upstream": ("3.11", (*OLD, *UPSTREAM, "mmcv==2.1.*"), "torch2.1"),
}
# mmdet imports all of mmcv's compiled operators, which mmcv-lite lacks; training calls none.
MISSING_OPERATORS = """
def __getattr__(name):
    def missing(*args, **kwargs):
        raise NotImplementedError(f"mmcv-lite lacks the operator {name}")

    return missing
"""

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
nox.options.envdir = str(FOLDER)
# uv reads neither pip's variable nor pyenv's list of Pythons.
os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ.get("PIP_FIND_LINKS", "").split()))
if shutil.which("pyenv"):
    bare = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
    os.environ.setdefault("PYENV_VERSION", ":".join(reversed(bare.stdout.split())))


def install(session: nox.Session, packages: tuple[str, ...]) -> None:
    """Installs the packages, and pytest; skips the session where they are unavailable."""
    packages = (*packages, "wheel", "pytest")
    if not any(package.startswith("setuptools") for package in packages):
        packages += ("setuptools",)
    # What is compiled comes as a wheel; onedl-mmdetection has none, and its build needs torch.
    options = [f"--only-binary={name}" for name in ("torch", "numpy", "mmcv", "onedl-mmcv")]
    openmmlab = [package for package in packages if "mm" in package]
    try:
        session.install(*options, *(p for p in packages if p not in openmmlab))
        if openmmlab:
            session.install(*options, "--no-build-isolation", *packages)
    except nox.command.CommandFailed:
        session.skip("these packages cannot be installed; uv's reason is above")


def run_tests(session: nox.Session) -> str:
    """Runs the tests of ``TESTS`` on the installed package; returns pytest's summary."""
    shutil.copytree(ROOT / "tests", "tests", dirs_exist_ok=True)  # beside no other mmsoftpool
    options = ("-q", "--color=no", "-p", "no:cacheprovider", "-k", "not onnx")
    tests = (f"tests/ops/{name}" for name in TESTS)
    output = session.run("python", "-m", "pytest", *options, *tests, silent=True)
    return re.sub(r" in .*|, \d+ (deselected|warnings?)|=", "", output.splitlines()[-1]).strip()


def run_demo(session: nox.Session, lite: bool) -> str:
    """Trains the demo for two iterations and, where mmcv has its operators, evaluates it."""
    if lite:
        (mmcv,) = Path(session.virtualenv.location).glob("lib/python*/site-packages/mmcv")
        (mmcv / "_ext.py").write_text(MISSING_OPERATORS)
    shutil.rmtree("work_dirs", ignore_errors=True)
    draw = ("data/shapes", "--train", "32", "--val", "10")
    session.run("python", str(ROOT / "tools" / "make_shapes.py"), *draw)
    options = ["train_cfg.max_epochs=1", "default_hooks.logger.interval=1"]
    # Two iterations give no score above the demo's threshold; without detections no AP.
    options += ["model.test_cfg.score_thr=0"]
    options += ["train_cfg.val_begin=2"] if lite else []
    config = ROOT / "configs" / "demo" / "demo_retinanet_softpool.py"
    train = (str(ROOT / "tools" / "train.py"), str(config), "--cfg-options", *options)
    output = session.run("python", *train, silent=True)
    if "[2/2]" not in output or not (lite or "bbox_mAP" in output):
        session.error(f"the demo's training has no result:\n{output}")
    return "2 iterations" if lite else "2 iterations, evaluation"


def session(name: str, python: str, packages: tuple[str, ...], wheel: str | None) -> None:
    """Registers a session."""

    @nox.session(name=name, python=python, requires=[wheel] if wheel else [])
    def run(session: nox.Session) -> None:
        # The package comes from the environment, and the GPU, if there is one, has its own tests.
        # Optimisation triples the time of a build, and torch's headers do not depend on it.
        session.env.update(
            MMSOFTPOOL_CUDA="0", CXXFLAGS="-O1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=None
        )
        install(session, packages)
        folder = FOLDER / f"{wheel or name}-dist"
        if not wheel:
            shutil.rmtree(folder, ignore_errors=True)
            target = ("--python", session.virtualenv.location, "--out-dir", str(folder))
            session.run("uv", "build", "--no-build-isolation", *target, str(ROOT), external=True)
        session.install("--no-deps", "--reinstall", *map(str, folder.glob("*.whl")))
        listing = session.run(
            "uv", "pip", "list", "--quiet", "--format=json", silent=True, external=True
        )
        versions = {entry["name"]: entry["version"] for entry in json.loads(listing)}
        openmmlab = [f"{name} {versions[name]}" for name in versions if "mm" in name]
        openmmlab = [text for text in openmmlab if not text.startswith("mmsoftpool")]
        with session.chdir(session.create_tmp()):
            if openmmlab:
                results = ["", run_demo(session, "mmcv-lite" in versions)]
            else:
                results = [run_tests(session) + (f" (wheel of {wheel})" if wheel else ""), ""]
        cells = [versions["torch"], python, versions["numpy"], ", ".join(openmmlab), *results]
        with open(FOLDER / "table.md", "a") as table:
            print(f"| {' | '.join(cells)} |", file=table)


for name, row in SESSIONS.items():
    session(name, *row)
