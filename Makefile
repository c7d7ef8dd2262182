# One command each: demo, test, test-all, check, test-gpu, pictures, bench. All work from a fresh
# clone; the virtual environment is made on first use and again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# Without an NVIDIA card, the release that has a CPU build: a plain `torch` would fetch gigabytes
# of CUDA packages. TORCH_INDEX names another package index (PyTorch's own CPU index, say).
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
TORCH_INDEX ?=
# What is imported is compiled at its first import, and kept; the rest, most of it, never.
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =
RUN = $(VENV)/bin/python -m
OUT ?= demo_output
JOBS ?= 2
RANKS ?= all

.PHONY: help demo test test-all test-video test-windows check provision test-gpu pictures bench bench-multi clean

help:
	@echo "make demo      decode the sample latents to $(OUT)/ (mp4, contact sheet, layout report)"
	@echo "make test      check, and run the tests without the expensive variants"
	@echo "make test-all  check, and run every test that this machine can run"
	@echo "make test-video  read and write videos with the oldest PyAV that ComfyUI allows"
	@echo "make check     lint, format, spelling, large files, types (Linux, Windows, macOS)"
	@echo "make test-gpu  run the tests that need a CUDA device (PYTHON with its own torch: VENV=...)"
	@echo "make test-windows  run the unit tests under Windows' Python and Wine (WINDOWS=--fast)"
	@echo "make pictures  take the screenshots of README and example workflows anew"
	@echo "make bench-multi  one decode over this machine's GPUs: right, timed, broken (RANKS=1,2)"
	@echo "make bench     compare with fastvae, diffusers and ComfyUI (BENCH='--output FOLDER' keeps it)"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)" numpy
	$(PIP) --editable .
	touch $@

# comfy-kitchen without its compiled kernels: a wheel of 260 KB, where those with them have 68 MB. In
# the tests it computes with PyTorch.
KITCHEN = comfy-kitchen==0.2.40
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[test]"
	$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--only-binary :all: --platform any --dest $(VENV)/wheels "$(KITCHEN)"
	$(PIP) --no-deps $(VENV)/wheels/comfy_kitchen-*-none-any.whl
	touch $@

demo: $(VENV)/.demo
	$(RUN) wan_vae demo --output $(OUT)

check: $(VENV)/.test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) codespell_lib
	$(RUN) tests.architecture.check_files
	$(RUN) tests.architecture.check_types

# A ComfyUI, its frontends and the registry's tools, in the user's cache folder. Needs nothing that
# pip installs, so that `make -j2 test` does it beside that and the checks.
provision: | $(VENV)/bin/python
	$(RUN) tests.comfy.provision

# Two processes, as most tests keep one core busy. tests/conftest.py says which tests share a
# process, because they share servers or browsers.
PYTEST = node --test tests/js/ && $(RUN) pytest -n $(JOBS)

test: check provision
	$(PYTEST) -m "not full"

test-all: check provision
	$(PYTEST)

# What `make test` reads with the newest PyAV. Beside the environment, not in it.
OLD_AV = 14.2.0
$(VENV)/av-$(OLD_AV): $(VENV)/.test
	$(PIP) --no-deps --target $@ "av==$(OLD_AV)"

test-video: $(VENV)/av-$(OLD_AV)
	PYTHONPATH=$< $(RUN) pytest -q tests/unit/test_video_read.py tests/unit/test_video_sink.py

test-gpu:
	$(PYTHON) -m pytest -m "gpu or nccl"

# Debian 12 as root: see tests/windows/README.md. WINDOWS holds options and files of tests.
test-windows:
	$(PYTHON) tests/windows/run_tests.py $(WINDOWS)

pictures: $(VENV)/.test
	$(RUN) tests.browser.pictures

# COMFYUI_PATH names a ComfyUI checkout to compare with; BENCH holds options (wan-vae bench --help).
$(VENV)/.bench: $(VENV)/.demo
	$(PIP) --editable ".[bench]"
	touch $@

bench: $(VENV)/.bench
	$(RUN) wan_vae bench $(BENCH)

# On a machine with several GPUs, with its own Python and torch. RANKS: 1,2,4 or all.
bench-multi:
	$(PYTHON) -m wan_vae bench --ranks $(RANKS) --output $(OUT)

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
