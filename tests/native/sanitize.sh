#!/usr/bin/env bash
# The native code under sanitizers; `make san` calls it, `make san ARGS="FILE..."` for single files.
#
#   tests/native/sanitize.sh              # everything below
#   tests/native/sanitize.sh python       # Python tests of tests/native, address and undefined
#   tests/native/sanitize.sh drivers      # C++ drivers: address and undefined, then thread
#   tests/native/sanitize.sh arm64        # C++ drivers of an ARM64 build under qemu-aarch64
#   tests/native/sanitize.sh tests/native/test_matrix.py ...
#
# Every test file runs in a process of its own on a copy of the tree in build/san/tree, so that one
# report ends one file and the library of the checkout stays as it is. Logs: build/san/*.log.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
PYTHON=${PYTHON:-$root/.venv/bin/python}
CXX=${CXX:-c++}
JOBS=${JOBS:-$(nproc)}
PATH="$(cd "$(dirname "$PYTHON")" && pwd):$PATH"

# library NAME CMAKE_ARGS...: builds build/NAME/libkt.so
library() {
  local name=$1
  shift
  cmake -S native -B "build/$name" -G Ninja "$@" >/dev/null
  cmake --build "build/$name" | { grep -v '^\[' || true; }
  test -f "build/$name/libkt.so"
}

# drivers NAME COMPILER FLAGS...: builds the drivers against build/NAME/libkt.so, beside it
drivers() {
  local name=$1 compiler=$2 driver
  shift 2
  for driver in layers program; do
    "$compiler" -std=c++20 -O1 -g1 -Wall -Wextra "$@" -Inative/include -pthread \
      "tests/native/drivers/$driver.cpp" "build/$name/libkt.so" -Wl,-rpath,"$root/build/$name" \
      -o "build/$name/$driver"
  done
}

# timed LABEL COMMAND...: one line with the seconds; the log is shown when it fails
timed() {
  local label=$1 log start=$SECONDS
  shift
  log="build/san/${label//\//_}.log"
  if "$@" >"$log" 2>&1; then
    printf '  %-34s ok %5d s\n' "$label" $((SECONDS - start))
  else
    printf '  %-34s FAILED, %s:\n' "$label" "$log"
    tail -n 40 "$log"
    cat "$log".* 2>/dev/null | head -n 60 || true
    return 1
  fi
}

one_file() (  # a subshell: it changes folder and environment
  file=$1
  label=$(basename "$file" .py)
  rm -f "$root/build/san/$label.log".*
  # libstdc++ has to be there when libasan starts, or it does not find __cxa_throw.
  cd build/san/tree
  export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS
  LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libstdc++.so)"
  ASAN_OPTIONS="detect_leaks=0:log_path=$root/build/san/$label.log"
  UBSAN_OPTIONS="print_stacktrace=1:log_path=$root/build/san/$label.log"
  PYTHONPATH=. PYTHONMALLOC=malloc "$PYTHON" -m pytest -q -p no:cacheprovider -p no:randomly \
    --timeout 0 -m "not slow" "$file" || [ $? = 5 ]  # 5: all tests of the file are slow
)

python_tests() {
  echo "== Python tests, address and undefined sanitizers (a file each, $JOBS at a time)"
  library san/library -DKT_SAN=address,undefined
  rm -rf build/san/tree
  mkdir -p build/san/tree/kt_async/ffi
  git ls-files -z --cached --others --exclude-standard -- '*.py' '*.toml' '*.yaml' '*.h' '*.cu' \
    '*.cpp' '*.inl' tests | xargs -0 cp --parents -t build/san/tree
  cp build/san/library/libkt.so build/san/tree/kt_async/ffi/
  export -f timed one_file
  export root PYTHON CXX
  # xargs ends with 123 when a file failed, after all have run.
  printf '%s\n' "$@" | xargs -P "$JOBS" -I{} bash -c 'timed "$(basename {} .py)" one_file {}'
}

native_drivers() {
  # Without ASLR: the thread sanitizer of gcc 12 and 13 cannot map its shadow on kernels that
  # randomise more bits than it knows.
  local plain=(setarch "$(uname -m)" -R)
  command -v setarch >/dev/null || plain=()
  echo "== C++ drivers, address and undefined sanitizers"
  library san/library -DKT_SAN=address,undefined
  drivers san/library "$CXX" -fsanitize=address,undefined -fno-sanitize-recover=all
  timed address/layers build/san/library/layers
  timed address/program build/san/library/program
  echo "== C++ drivers, thread sanitizer"
  library san/thread -DKT_SAN=thread
  drivers san/thread "$CXX" -fsanitize=thread
  timed thread/layers "${plain[@]}" build/san/thread/layers
  timed thread/program "${plain[@]}" build/san/thread/program
}

arm64() {
  echo "== ARM64 build, scalar kernels under qemu-aarch64"
  local compiler=aarch64-linux-gnu-g++ emulator
  emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || true
  if ! command -v $compiler >/dev/null; then
    echo "  skipped: needs $compiler (Debian/Ubuntu: apt-get install g++-aarch64-linux-gnu)"
    return
  fi
  library arm64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=$compiler -DKT_WERROR=ON
  drivers arm64 $compiler
  if [ -z "$emulator" ]; then
    echo "  built; not run: needs qemu-aarch64 (Debian/Ubuntu: apt-get install qemu-user-static)"
    return
  fi
  local run=("$emulator" -L /usr/aarch64-linux-gnu)
  timed arm64/layers "${run[@]}" build/arm64/layers
  timed arm64/program "${run[@]}" build/arm64/program
  if [ "$(uname -m)" = x86_64 ]; then
    library native
    drivers native "$CXX"
    build/native/program 0 >build/san/scalar.txt  # 0: KT_ISA_SCALAR
    cmp build/san/scalar.txt build/san/arm64_program.log
    echo "  same tokens as the scalar kernels of this machine"
  fi
}

mkdir -p build/san
if [ $# -eq 0 ]; then
  set -- drivers python arm64
fi
case $1 in
  python | drivers | arm64) parts=("$@") ;;
  *)
    python_tests "$@"
    exit
    ;;
esac
for part in "${parts[@]}"; do
  case $part in
    python) python_tests tests/native/test_*.py ;;
    drivers) native_drivers ;;
    arm64) arm64 ;;
    *)
      echo "sanitize.sh: $part is not python, drivers, arm64 or a list of test files" >&2
      exit 2
      ;;
  esac
done
