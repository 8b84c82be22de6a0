# Commands for users and developers; `make help` lists them. Everything is made in this folder:
# .venv (packages), build/ (objects), kt_async/ffi/libkt.so (the library).
# VENV=DIR uses an existing environment as it is; ARGS="..." is passed on to the program.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
BUILD ?= build/native
SAN ?=
ARGS ?=
CXX ?= c++
SOURCES = $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')
PY = PYTHONPATH=. $(BIN)/python
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev serve test test-all test-gpu native bench bench-gpu bench-kernels lint format types size \
  san san-gpu fuzz wheel clean check-tools

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Two stamps, so that `make serve` needs no test tools.
RUN_STAMP = $(VENV)/.ready-run
DEV_STAMP = $(VENV)/.ready-dev
ifeq ($(origin VENV),file)
setup: $(RUN_STAMP) ## create .venv with what the server needs (done by the others when needed)
setup-dev: $(DEV_STAMP) ## ... and with the tools of tests and lint
else
setup setup-dev:
endif

# $(1): extras beside the dependencies, as named in pyproject.toml. pip runs only when the list of
# packages or a pinned version changed, not for every edit of pyproject.toml.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "== creating $(VENV)"; $(PYTHON) -m venv $(VENV) || \
	  { echo "Cannot create $(VENV); on Debian/Ubuntu: apt-get install python3-venv"; exit 1; }; }
	@$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  x = p["optional-dependencies"]; print(*p["dependencies"], *sum((x[e] for e in "$(1)".split()), []), \
	  "cmake", "ninja", sep="\n")' > $(VENV)/wanted.txt
	@cat $(VENV)/wanted.txt .ci/constraints.txt | cmp -s - $@ || { \
	  echo "== installing packages into $(VENV) (torch is large; needed once)"; \
	  $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on \
	  -r $(VENV)/wanted.txt -c .ci/constraints.txt; }
	@cat $(VENV)/wanted.txt .ci/constraints.txt > $@
endef

$(RUN_STAMP): pyproject.toml .ci/constraints.txt
	$(call install,)
$(DEV_STAMP): pyproject.toml .ci/constraints.txt
	$(call install,dev uvloop)

check-tools:
	@command -v $(CXX) >/dev/null || { echo "No C++ compiler ($(CXX)) found; install one and run \
	again (Debian/Ubuntu: apt-get install g++)."; exit 1; }

serve: native ## set everything up and serve the demo model on port 10002 (ARGS="model.gguf ...")
	@echo "== starting the server: python -m kt_async $(ARGS)"
	@exec env $(PY) -m kt_async $(ARGS)

test: setup-dev native ## all tests of this machine but the slow ones; skips are listed at the end
	@$(PY) -m pytest -m "not slow" $(ARGS)

test-all: setup-dev native ## every test, the slow ones too
	@$(PY) -m pytest $(ARGS)

native: check-tools setup ## build the native library into kt_async/ffi (incremental)
	@test -f $(BUILD)/build.ninja || echo "== building the native library (the first time takes minutes)"
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S native -B $(BUILD) -G Ninja -DKT_SAN=$(SAN) >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD)
	@cmp -s $(BUILD)/libkt.so kt_async/ffi/libkt.so || \
	  { cp -f $(BUILD)/libkt.so kt_async/ffi/libkt.new && mv -f kt_async/ffi/libkt.new kt_async/ffi/libkt.so; }

bench: setup-dev native ## start a server and measure it: table, JSON lines, plots in results/
	@$(PY) bench/run.py $(ARGS)

test-gpu: setup-dev native ## the tests that need a CUDA GPU
	@$(PY) -m pytest tests/gpu $(ARGS)

bench-gpu: setup-dev native ## the GPU engine without HTTP (ARGS="model.gguf --experts cpu")
	@$(PY) bench/gpu.py $(ARGS)

bench-kernels: setup-dev native ## kernels against the memory bandwidth and peak of this machine
	@$(PY) bench/kernels.py $(ARGS)

lint: setup-dev ## format check, ruff, mypy, clang-format
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: setup-dev ## rewrite sources in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/clang-format -i $(SOURCES)

types: setup-dev ## mypy --strict alone
	@$(BIN)/mypy

size: ## lines per folder
	@git ls-files '*.py' '*.cpp' '*.h' '*.inl' '*.cu' | xargs wc -l | grep -v ' total$$' | \
	  awk '{ n = split($$2, p, "/"); d = n > 2 ? p[1] "/" p[2] : p[1]; s[d] += $$1; t += $$1 } \
	  END { for (d in s) printf "%7d %s\n", s[d], d; printf "%7d total\n", t }' | sort -k2

san: setup-dev ## native code under sanitizers, every part (ARGS="python", "drivers", "arm64" or files)
	@PYTHON=$(abspath $(BIN))/python CXX="$(CXX)" tests/native/sanitize.sh $(ARGS)

san-gpu: setup-dev native ## CUDA kernels under compute-sanitizer (ARGS="memcheck router" for a part)
	@PYTHON=$(abspath $(BIN))/python tests/gpu/sanitize.sh $(ARGS)

fuzz: setup-dev native ## random GGUF files, HTTP bodies and schedules, for longer than `make test`
	@$(PY) -m pytest tests/fuzz --timeout 0 --hypothesis-profile=long $(ARGS)
	@$(MAKE) --no-print-directory -C tests/native/drivers

wheel: setup-dev ## build the wheel into dist/
	@$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps -w dist .

clean: ## remove what was built; .venv stays
	rm -rf build dist results *.egg-info kt_async/ffi/libkt.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
