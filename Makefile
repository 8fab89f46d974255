# make env    set up .venv (torch, mmcv, mmdet, the compiled operator); the others do it first if needed
# make demo   train and evaluate a small SoftPool detector on data it draws itself, in under 10 minutes
# make test   lint, documentation and tests
# make test-slow    the tests that take minutes: every network, the wheel for every GPU
# make docs   the documentation as HTML, in build/docs/html
# make wheel  dist/*.whl for every Python, and for every torch from 2.10 on
# make format rewrite the sources in the project's style
# make fuzz   damaged files for every tool, for an hour, and a demo that is killed ten times; make test
#             has half a minute of the one and two kills
# make aarch64    the CPU kernels on an emulated 64-bit ARM against those of this machine
# make matrix  the operator and the demo with other versions of Python, torch, numpy, mmcv and mmdet
# make test-ptx    what nvcc makes of the CUDA kernels, run on the CPU
# make sanitize, make sanitize-cuda    the operator's tests under the sanitizers
# make gpu-report    test and measure on a GPU, in under 9 minutes; needs nvcc, torch and pytest

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# `python -m` keeps working when the checkout, and with it .venv, is moved.
PY     := $(BIN)/python
# The CUDA library is compiled and tested here also with a torch that has no CUDA, where nvcc is.
export MMSOFTPOOL_CUDA ?= 1
CSRC   := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: env demo test test-slow test-ptx fuzz docs lint format wheel matrix aarch64 sanitize sanitize-cuda gpu-report clean
.DELETE_ON_ERROR:

env: $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml scripts/setup_env.sh
	PYTHON=$(PYTHON) scripts/setup_env.sh $(VENV)
	touch $@

# The set-up has just compiled the libraries, where it had to run; they are not compiled twice.
LIBRARY := mmsoftpool/libmmsoftpool_cpu.so
$(VENV)/.built: setup.py $(CSRC) | $(VENV)/.installed
	@[ -e $(LIBRARY) ] && [ -z "$$(find $^ -newer $(LIBRARY))" ] || \
	  $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# `train --resume` resumes an interrupted demo, and skips a training that is complete.
DEMO      := configs/demo/demo_retinanet_softpool.py
DEMO_RUN  := work_dirs/demo_retinanet_softpool
demo: env
	$(PY) tools/make_shapes.py data/shapes
	$(PY) tools/train.py $(DEMO) --resume
	$(PY) tools/test.py $(DEMO) $(DEMO_RUN)/epoch_16.pth \
	  --out $(DEMO_RUN)/predictions.pkl --show-dir $(DEMO_RUN)/pictures
	$(PY) tools/draw_run.py $(DEMO) $(DEMO_RUN)/predictions.pkl
	@echo "The COCO table is above; every image with its detections is in $(DEMO_RUN)/pictures."
	@echo "To train anew: rm -r $(DEMO_RUN)"

# Two processes of one thread each: most of the time goes into starting Python, and threads of two
# processes on two cores wait for each other. JOBS=8 where there are more cores. A process that a test
# ends is not replaced: pytest-xdist may then wait forever.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --max-worker-restart 0
test: env lint docs
	$(PYTEST) --dist loadfile -m "not slow"

test-slow: env $(VENV)/.networks
	$(PYTEST) --dist loadfile -m slow --ignore tests/replace/test_packages.py
	PYTHONPATH=$(VENV)/networks $(PYTEST) -m slow tests/replace/test_packages.py

fuzz: env
	MMSOFTPOOL_FUZZ=100 $(PYTEST) tests/test_fuzz.py tests/test_kill.py

# -W: a broken link, or a docstring that is not valid reStructuredText, is an error.
docs: env
	$(PY) -W ignore -m sphinx -W --keep-going -q -b html -d build/docs/doctrees docs build/docs/html
	@echo "The documentation is in build/docs/html/index.html."

SCHEMA := $(PY) -m check_jsonschema -q --builtin-schema
lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy mmsoftpool/ops mmsoftpool/replace mmsoftpool/models
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff

format: env
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)/clang-format -i $(CSRC)

# For systems with this machine's glibc or later; .github/workflows/wheels.yml builds for older ones.
wheel: env
	MMSOFTPOOL_CUDA=all $(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

# What tests/replace/test_packages.py takes networks from, beside torchvision and timm. In a folder
# of their own: MMPretrain does not import where a recent transformers is installed.
$(VENV)/.networks: | $(VENV)/.installed
	$(PY) -m pip install -q --no-deps --target $(VENV)/networks segmentation-models-pytorch monai \
	  transformers tokenizers regex ultralytics ultralytics-thop psutil polars polars-runtime-32 \
	  pytorchcv
	touch $@

# The package with other versions of Python, torch, numpy and OpenMMLab's packages: hours, and 5 GB of
# disk for each torch; `make matrix ROWS="torch2.4 onedl"` runs only these and what they need.
matrix: env
	$(PY) -m pip install -q nox uv
	PATH="$(abspath $(BIN)):$$PATH" nice $(PY) -m nox $(if $(ROWS),-s $(ROWS))

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set
# that the machine has, and the CUDA kernels as the host runs them; then the usual build again.
# Half an hour or so on two cores.
ASAN = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
       ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
sanitize: env
	CXXFLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" MMSOFTPOOL_CUDA=0 \
	  $(PY) setup.py -q build_ext --inplace
	status=0; for capability in default avx2 avx512; do \
	  ATEN_CPU_CAPABILITY=$$capability $(ASAN) $(PY) -m pytest -q -p no:cacheprovider \
	    tests/ops/test_functional.py tests/ops/test_autograd.py tests/ops/test_properties.py \
	    tests/ops/test_raw_operator.py tests/ops/test_windows.py tests/ops/test_adaptive.py \
	    -m "not slow" -k "not reference" || status=1; \
	done; CXXFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all" \
	  $(ASAN) $(PY) -m pytest -q -p no:cacheprovider tests/ops/test_cuda_on_host.py || status=1; \
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .; exit $$status

# What nvcc makes of all CUDA kernels, run on the CPU; a test has some of them.
test-ptx: env
	echo 8.0 9.0 | xargs -n 1 -P $(JOBS) sh -c \
	  'MMSOFTPOOL_PTX=$$0 OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/ops/test_ptx.py'

aarch64: env
	command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64 || { \
	  echo "error: needs a cross compiler and qemu (on Debian: apt-get install g++-aarch64-linux-gnu" \
	    "qemu-user)" >&2; exit 1; }
	$(PY) -m pytest -q tests/ops/test_aarch64.py

# The CUDA kernels under compute-sanitizer; needs a GPU.
sanitize-cuda: env
	compute-sanitizer --error-exitcode 1 $(PY) -m pytest -q tests/ops/test_cuda.py -m cuda \
	  -k "not 2_31 and not graph and not compile"

# Without the environment of `make env`: the Python that is there has torch for its GPU.
gpu-report:
	$(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_report.py

clean:
	rm -rf build dist *.egg-info mmsoftpool/*.so mmsoftpool/.mim $(VENV)/.built
