# Developer and user commands; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
BUILD ?= build/native
SAN ?=

.PHONY: help native
help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

native: ## build the native library into kt_async/ffi (incremental)
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S native -B $(BUILD) -G Ninja -DKT_SAN=$(SAN) >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD)
	@cp -f $(BUILD)/libkt.so kt_async/ffi/libkt.so
