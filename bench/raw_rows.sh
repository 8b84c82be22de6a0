#!/usr/bin/env bash
# Builds and runs bench/raw_rows.cpp against the built library: bench/raw_rows.sh [THREADS]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
isa="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
# shellcheck disable=SC2086 - flags
${CXX:-c++} -std=c++20 -O2 -Wall -Wno-maybe-uninitialized -Wno-uninitialized $isa -mamx-tile -mamx-int8 \
  -Inative/include -Inative/src bench/raw_rows.cpp native/src/host/workers.cpp \
  native/src/host/topology.cpp native/src/host/features.cpp native/src/base/error.cpp \
  kt_async/ffi/libkt.so -Wl,-rpath,"$PWD/kt_async/ffi" -pthread -o build/raw_rows
exec build/raw_rows "$@"
