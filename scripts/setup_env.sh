#!/usr/bin/env bash
# Creates a virtual environment with everything the project needs: torch, mmcv, mmdet, the linters.
# Usage: scripts/setup_env.sh [VENV_DIR]     (`make env` calls it with .venv)
# Safe to call again: what is already there is kept, and an interrupted build resumes.
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

# Writes a C++ compiler, $kept/compiler/c++, that parses torch's headers once and not for each file.
write_compiler() {
  rm -rf "$kept/compiler" && mkdir "$kept/compiler"
  echo '#include <torch/types.h>' >"$kept/compiler/torch.hpp"
  cat >"$kept/compiler/c++" <<'END'
#!/usr/bin/env bash
set -e
header=${0%/*}/torch.hpp flags=() compiles=
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    -c) compiles=yes ;;
    -o | -MF) ((++i)) ;;
    -MMD | *.cpp) ;;
    *) flags+=("${!i}") ;;
  esac
done
[ "$compiles" ] || exec $MMSOFTPOOL_CXX "$@"
exec 9>"$header.lock"
flock 9
[ -e "$header.gch" ] || $MMSOFTPOOL_CXX "${flags[@]}" -w -x c++-header "$header" -o "$header.gch"
exec 9>&-
exec $MMSOFTPOOL_CXX -include "$header" "$@"
END
  chmod +x "$kept/compiler/c++"
}

# Compiles mmcv into the folder $kept, where the files that are compiled stay until the wheel is there:
# an interrupted build resumes where it stopped.
build_mmcv() {
  mkdir -p "$kept"
  if [ ! -d "$kept/source" ]; then
    pip download -q --no-deps --no-build-isolation --no-binary onedl-mmcv -c constraints.txt \
      -d "$kept" onedl-mmcv
    rm -rf "$kept/unpacked" && mkdir "$kept/unpacked"
    tar -xf "$kept"/onedl_mmcv-*.tar.gz -C "$kept/unpacked" --strip-components=1
    mv "$kept/unpacked" "$kept/source"
  fi
  local python files=0 total left
  python=$(realpath -s "$venv/bin/python")
  write_compiler
  SECONDS=0
  # Without debug information, which Python's flags ask for, the compiler needs half the time.
  (cd "$kept/source" &&
    env "$@" CFLAGS="${CFLAGS:-} -g0" MMSOFTPOOL_CXX="${CXX:-c++}" CXX="$kept/compiler/c++" \
      "$python" setup.py bdist_wheel -d "$kept/finished" 2>&1) |
    tee "$kept/log" | while IFS= read -r line; do
      if [[ $line =~ ^\[([0-9]+)/([0-9]+)\] ]]; then  # ninja counts the files that are left to do
        files=${BASH_REMATCH[1]} total=${BASH_REMATCH[2]}
        left=$((SECONDS * (total - files) / files / 60 + 1))
        echo "   compiled $files of $total files, about $left minutes left"
      fi
    done || { tail -n 30 "$kept/log"; die "mmcv does not compile, see above and $kept/log"; }
  mv "$kept"/finished/*.whl "$kept"
  rm -rf "$kept/source" "$kept/finished" "$kept/compiler"
}

if ! "$venv/bin/python" -c 'import mmcv.ops' 2>/dev/null; then
  hide_gpu=()
  if "$venv/bin/python" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' &&
      [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && ! command -v nvcc >/dev/null; then
    hide_gpu=(CUDA_VISIBLE_DEVICES=)
  fi
  # A wheel fits one version of Python and of torch, and has CUDA operators or not.
  kept=${XDG_CACHE_HOME:-$HOME/.cache}/mmsoftpool/$(
    "$venv/bin/python" -W ignore -c \
      'import sys, torch; print("mmcv-python{}.{}-torch{}".format(*sys.version_info[:2], torch.__version__))'
  )-$(sed -n 's/^onedl-mmcv==//p' constraints.txt)${hide_gpu:+-without-gpu}
  # torch must not be replaced by mmcv's build, hence no build isolation (here and below).
  mmcv=(install -q --no-build-isolation -c constraints.txt --find-links "$kept"
    --only-binary onedl-mmcv onedl-mmengine onedl-mmcv onedl-mmdetection)
  echo "== mmcv (looking for a prebuilt wheel)"
  mkdir -p "$kept"
  if ! pip "${mmcv[@]}" 2>/dev/null; then
    command -v c++ >/dev/null || command -v g++ >/dev/null ||
      die "there is no prebuilt mmcv for this torch and no C++ compiler to build it (on Debian and Ubuntu: apt-get install g++)"
    echo "== mmcv: no prebuilt wheel fits this torch, so its operators are compiled now."
    echo "   This takes about three minutes on two cores, once: the wheel is kept in $kept."
    if [ ${#hide_gpu[@]} -gt 0 ]; then
      echo "   There is a GPU but no CUDA compiler (nvcc): mmcv's operators are built for the CPU only."
      echo "   Wheels with the CUDA operators are at https://mmwheels.onedl.ai (python -m pip install onedl-mim,"
      echo "   then mim install onedl-mmcv). SoftPool itself does not need them."
    fi
    build_mmcv "${hide_gpu[@]}"
    pip "${mmcv[@]}"
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
