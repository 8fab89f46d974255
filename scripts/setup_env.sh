#!/usr/bin/env bash
# Creates a virtual environment with everything the project needs: torch, mmcv, mmdet, the linters.
# Usage: scripts/setup_env.sh [VENV_DIR]     (`make env` calls it with .venv)
# Safe to call again: what is already there is kept, and a build that was interrupted starts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

if [ ! -x "$venv/bin/pip" ]; then
  command -v "$python" >/dev/null || die "no '$python' found; install Python 3.10 or newer, or name one: make env PYTHON=python3.11"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$python" --version) is too old, Python 3.10 or newer is needed; name one: make env PYTHON=python3.11"
  echo "== creating $venv with $("$python" --version)"
  "$python" -m venv "$venv" || die "could not create $venv (on Debian and Ubuntu: apt-get install python3-venv)"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "== torch and the build tools"
pip install -q -c constraints.txt torch
pip install -q -c constraints.txt 'setuptools>=80' wheel packaging psutil ninja

if ! "$venv/bin/python" -c 'import mmcv.ops' 2>/dev/null; then
  # torch must not be replaced by mmcv's build, hence no build isolation (here and below).
  mmcv=(install --no-build-isolation -c constraints.txt onedl-mmengine onedl-mmcv onedl-mmdetection)
  echo "== mmcv (looking for a prebuilt wheel)"
  if ! pip "${mmcv[@]}" -q --only-binary onedl-mmcv 2>/dev/null; then
    command -v c++ >/dev/null || command -v g++ >/dev/null ||
      die "there is no prebuilt mmcv for this torch and no C++ compiler to build it (on Debian and Ubuntu: apt-get install g++)"
    echo "== mmcv: no prebuilt wheel fits this torch, so its operators are compiled now."
    echo "   This takes 7 minutes or more on two cores, once; pip prints a line a minute meanwhile."
    hide_gpu=()
    if "$venv/bin/python" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' &&
        [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && ! command -v nvcc >/dev/null; then
      echo "   There is a GPU but no CUDA compiler (nvcc): mmcv's operators are built for the CPU only."
      echo "   Wheels with the CUDA operators are at https://mmwheels.onedl.ai (python -m pip install onedl-mim,"
      echo "   then mim install onedl-mmcv). SoftPool itself does not need them."
      hide_gpu=(CUDA_VISIBLE_DEVICES=)
    fi
    # Without debug information, which Python's flags ask for, the compiler needs half the time.
    env "${hide_gpu[@]}" CFLAGS="${CFLAGS:-} -g0" "$venv/bin/python" -m pip --disable-pip-version-check "${mmcv[@]}"
  fi
  "$venv/bin/python" -c 'import mmcv.ops' || die "mmcv was installed but does not load, see above (if libGL is missing, on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0)"
fi

echo "== mmdetection and mmsoftpool"
pip install -q --no-build-isolation -c constraints.txt -e '.[mmdet,pretrain,test,docs]'

# The tests' networks are torchvision's, and mmpretrain and timm import it too.
if ! error=$("$venv/bin/python" -W ignore -c 'import torchvision' 2>&1); then
  case $error in
    *"torchvision::nms does not exist"*)
      echo "== torchvision: this build needs CUDA and torch has none, so its operators are left out"
      site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
      cp scripts/torchvision_without_cuda.py "$site"
      echo 'import torchvision_without_cuda' >"$site/torchvision_without_cuda.pth"
      ;;
  esac
  "$venv/bin/python" -W ignore -c 'import torchvision' || die "torchvision does not load, see above"
fi
