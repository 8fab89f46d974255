"""The package builds with and without a C++ compiler."""

import zipfile

import pytest

from .conftest import ROOT


@pytest.fixture
def build_wheel(run_script, tmp_path):
    def build(**env):
        run_script(
            "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT,
            PIP_NO_INDEX="1", **env,
        )  # fmt: skip
        (wheel,) = tmp_path.glob("*.whl")
        return wheel, zipfile.ZipFile(wheel).namelist()

    return build


def test_one_wheel_for_every_python(build_wheel):
    wheel, names = build_wheel()
    assert (ROOT / "mmsoftpool" / "libmmsoftpool_cpu.so").exists()  # the editable install's
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and "any" not in wheel.name
    assert "mmsoftpool/libmmsoftpool_cpu.so" in names
    assert "mmsoftpool/models/resnet.py" in names
    assert not [name for name in names if name.startswith(("tests", "csrc"))]


def test_without_a_compiler_it_installs_on_the_reference(build_wheel, tmp_path):
    # A PATH without c++, g++, clang++ and nvcc.
    _, names = build_wheel(PATH=str(tmp_path), CXX="")
    assert "mmsoftpool/ops/reference.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_failing_compiler_fails_the_build(run_script, tmp_path):
    result = run_script(
        "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT,
        check=False, CXX="false", PIP_NO_INDEX="1",
    )  # fmt: skip
    assert result.returncode != 0
    assert "mmsoftpool: false failed" in result.stdout + result.stderr
