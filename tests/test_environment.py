"""`mmsoftpool doctor`: it diagnoses the environment, and its self-test can fail."""

import re

import pytest
import torch

from mmsoftpool import environment
from mmsoftpool.ops import reference
from mmsoftpool.ops.backends import OVERRIDE, TORCH_VERSION, Backend

ONEDL = {"onedl-mmengine": "0.10.12", "onedl-mmcv": "2.3.6", "onedl-mmdetection": "3.5.1"}
UPSTREAM = {"mmengine": "0.10.7", "mmcv": "2.1.0", "mmdet": "3.3.0"}
REQUIRES = {
    "mmdet": ["mmcv<2.2.0,>=2.0.0rc4; extra == 'mim'", "mmengine<1.0.0,>=0.7.1; extra == 'mim'"]
}


@pytest.fixture
def problems(tmp_path):
    """The problems of an environment that holds the given distributions and no others."""

    def find(versions):
        for name, version in versions.items():
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            lines = [f"Requires-Dist: {line}" for line in REQUIRES.get(name, [])]
            header = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            (folder / "METADATA").write_text("\n".join([*header, *lines]) + "\n")
        return list(environment.check_versions(environment.installed([str(tmp_path)])))

    return find


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.0", "numpy": "2.2.6"},
        {"torch": "2.13.0+cpu", "numpy": "2.2.6", **ONEDL},
        {"torch": "2.1.2", "numpy": "1.26.4", **UPSTREAM},
    ],
)
def test_compatible_versions_are_no_problem(problems, versions):
    assert problems(versions) == []


@pytest.mark.parametrize(
    ("versions", "what", "remedy"),
    [
        ({**ONEDL, "mmdet": "3.3.0"}, "mmdet is installed by 2 distr", "uninstall -y onedl-mmd"),
        ({**UPSTREAM, "onedl-mmengine": "0.10.12"}, "mmengine is installed by 2", "pip uninstall"),
        (
            {"mmengine": "0.10.7", "onedl-mmcv": "2.3.6"},
            "are mixed: mmengine 0.10.7, onedl-",
            "from",
        ),
        (
            {**UPSTREAM, "mmcv": "2.2.0"},
            r"mmdet 3.3.0 needs mmcv<2.2.0.* 2.2.0 is installed",
            "pip install",
        ),
        (
            {"mmengine": "0.10.7", "mmcv-lite": "2.1.0"},
            "lacks mmcv's compiled op",
            "uninstall -y mmcv-l",
        ),
        ({"torch": "2.6.0", **UPSTREAM}, "cannot resume .* torch 2.6.0", "torch < 2.6"),
        (
            {"torch": "2.1.2", "numpy": "2.2.6"},
            "numpy 2.2.6: it was compiled for numpy 1",
            "numpy<2",
        ),
        (
            {"torch": "2.1.2", "setuptools": "70.0.0"},
            "torch 2.1.2 does not go with setuptools 70",
            "setuptools<70",
        ),
        ({"torch": "2.0.1"}, "torch 2.0.1 is too old", "torch >= 2.1"),
    ],
)
def test_incompatible_versions_are_named_with_a_remedy(problems, versions, what, remedy):
    matching = [p for p in problems(versions) if re.search(what, p.what)]
    assert len(matching) == 1 and remedy in matching[0].remedy


WORKS = Backend("lib.so", "stable")
NO_GPU = dict(has_gpu=False, cuda_works=False, cuda_built=False)
GPU = dict(has_gpu=True, cuda_works=True, cuda_built=True)


def test_libraries_in_use_are_no_problem():
    assert not list(environment.check_libraries({"cpu": WORKS}, **NO_GPU))
    assert not list(environment.check_libraries({"cpu": WORKS, "cuda": WORKS}, **GPU))


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [("forced", "unset"), ("not built", "g++"), ("other torch", "reinstall against this torch")],
)
def test_a_cpu_library_that_is_not_in_use_is_explained(reason, remedy):
    backend = Backend(None, None, reason, "the detail")
    (problem,) = environment.check_libraries({"cpu": backend}, **NO_GPU)
    assert problem.what == "SoftPool on cpu is slow: the detail" and remedy in problem.remedy


@pytest.mark.parametrize(("reason", "remedy"), [("not built", "nvcc"), ("cannot run", "driver")])
def test_a_cuda_library_that_is_not_in_use_is_explained(reason, remedy):
    backend = Backend(None, None, reason, "the detail")
    (problem,) = environment.check_libraries({"cpu": WORKS, "cuda": backend}, **GPU)
    assert problem.what == "SoftPool on cuda is slow: the detail" and remedy in problem.remedy


@pytest.mark.parametrize(
    ("cuda_built", "what", "remedy"),
    [(False, "built without CUDA", "pytorch.org"), (True, "cannot use it", "driver")],
)
def test_a_gpu_that_torch_cannot_use_is_explained(cuda_built, what, remedy):
    machine = dict(has_gpu=True, cuda_works=False, cuda_built=cuda_built)
    (problem,) = environment.check_libraries({"cpu": WORKS}, **machine)
    assert what in problem.what and remedy in problem.remedy


def test_a_package_that_fails_to_import_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mmcv.ops", None)
    problem = next(p for p in environment.check_imports(["mmcv"]) if "mmcv.ops" in p.what)
    assert "ModuleNotFoundError" in problem.what and "--no-build-isolation" in problem.remedy


def test_the_output_fits_one_screen_and_ends_with_status_0(run_script):
    out = run_script("-m", "mmsoftpool", "doctor").stdout
    assert len(out.splitlines()) < 40 and max(map(len, out.splitlines())) < 200
    for expected in (
        r"mmsoftpool +\d",
        r"on cpu +libmmsoftpool_cpu.so \(stable ABI\), (default|avx2|avx512)",
        rf"torch +{re.escape(torch.__version__)}",
        r"mmdet +[\d.]+ \(.*mmdet",
        r"cpu +ok, compiled",
    ):
        assert re.search(expected, out), out


def test_the_reference_is_named_and_passes(run_script):
    out = run_script("-m", "mmsoftpool", "doctor", MMSOFTPOOL_BACKEND="reference").stdout
    assert "unset MMSOFTPOOL_BACKEND" in out and re.search("cpu +ok, reference", out)


@pytest.mark.skipif(TORCH_VERSION < (2, 5), reason="torch 2.5 and later override kernels")
@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_wrong_kernel_fails_the_self_test(capsys, broken):
    def wrong(*args):
        return getattr(reference, name)(*args) * 1.01

    name = "soft_pool" if broken == "forward" else "soft_pool_backward"
    with torch.library._scoped_library("mmsoftpool", "IMPL") as scoped:
        scoped.impl(name, wrong, "CPU", **OVERRIDE)
        assert environment.doctor() == 1
    assert re.search(r"cpu +FAILED, compiled: differs by .* is allowed", capsys.readouterr().out)
