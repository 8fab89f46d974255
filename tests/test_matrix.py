"""The matrix of versions: noxfile.py."""

import sys


def test_a_session_whose_packages_are_unavailable_is_skipped(run_script, tmp_path):
    options = ("-s", "torch2.4", "--force-python", sys.executable, "--envdir", tmp_path / "envs")
    result = run_script("-m", "nox", *options, UV_OFFLINE="1", UV_CACHE_DIR=str(tmp_path / "cache"))
    assert "skipped: these packages cannot be installed" in result.stderr
