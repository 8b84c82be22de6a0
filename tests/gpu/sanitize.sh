#!/usr/bin/env bash
# The CUDA kernels under NVIDIA's compute-sanitizer; `make san-gpu` calls it.
#
#   tests/gpu/sanitize.sh                    # every tool over every file that it can run
#   tests/gpu/sanitize.sh memcheck router    # only pairs of a tool and a file that are named
#
# Tests of kernels run under all four tools, those of whole engines under memcheck and synccheck:
# racecheck cannot run cuBLAS, and initcheck does not follow how libraries copy on Hopper. Several
# processes share the GPU (JOBS, 6). Logs: build/san-gpu/*.log. Needs the compute-sanitizer of a CUDA
# toolkit 12.8 or newer.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-6}
LIMIT=${LIMIT:-900} # seconds of one process
logs=${LOGS:-build/san-gpu}
mkdir -p "$logs"
names=$("$PYTHON" - native/cuda/*.cu <<'PY'
import pathlib, re, sys
kernel = r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\('
text = "".join(pathlib.Path(name).read_text() for name in sys.argv[1:])
names = [name for name in re.findall(kernel, text) if not name.startswith("__")]
print("|".join([*names, "multiply_.*"]))  # those come from a macro
PY
)

# one TOOL FILE: a line that says how it went
one() {
  local tool=$1 file=$2 log="$logs/$1-$2.log" start=$SECONDS select=() options=() found=""
  case $file in
    handoff) # tests of time limits would measure the tool
      select=(-k "not gives_up and not answer and not falls_back")
      [ "$tool" = racecheck ] && select=(-k "arrive_whole or that_fail")
      ;;
    engine) select=(-k "graphs_give_the_logits or seeded or kept_and or host_memory") ;;
    lane | kv_fp8) ;;
    *) # every tensor an allocation of its own: what one kernel leaves out cannot be another's
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      [ "$tool" = memcheck ] && options=(--padding 64)
      ;;
  esac
  options+=(--check-api-memory-access no) # a test may copy back more than a kernel wrote
  # Who checks what was never written must see every kernel write; the others watch ours alone.
  [ "$tool" = initcheck ] || options+=(--kernel-name "regex=^($NAMES)\$")
  # Tests of engines measure rates, which decide where experts are computed: under a tool they
  # may fail where it finds nothing. Its summary counts, and that tests ran to their end.
  timeout "$LIMIT" compute-sanitizer --tool "$tool" --print-limit 20 "${options[@]}" "$PYTHON" \
    -m pytest -c /dev/null --rootdir . -q -W ignore -p no:cacheprovider \
    "tests/gpu/test_$file.py" "${select[@]}" >"$log" 2>&1 || true
  found=$(grep -oE '([0-9]+ failed, )?[0-9]+ passed' "$log" | tail -n 1) || true
  if [ -n "$found" ] && grep -qE 'SUMMARY: 0 (errors|hazards)' "$log" &&
    ! grep -qE 'Sanitizer Error|did.?n.t terminate' "$log" &&
    { [[ $file =~ ^(engine|lane)$ ]] || [[ $found != *failed* ]]; }; then
    printf '  %-10s %-18s ok %5d s, %s\n' "$tool" "$file" $((SECONDS - start)) "$found"
  else
    printf '  %-10s %-18s FAILED after %d s: %s\n' "$tool" "$file" $((SECONDS - start)) "$log"
    return 1
  fi
}

tools=() files=()
for word in "$@"; do
  case $word in
    memcheck | racecheck | synccheck | initcheck) tools+=("$word") ;;
    *) files+=("$word") ;;
  esac
done
pairs() {
  local file tool
  for file in "${files[@]}"; do
    for tool in "${tools[@]}"; do
      case $tool-$file in
        racecheck-engine | racecheck-lane | racecheck-kv_fp8) ;;
        initcheck-engine | initcheck-lane | initcheck-kv_fp8 | initcheck-handoff) ;;
        *) echo "$tool $file" ;;
      esac
    done
  done
}
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck initcheck)
[ ${#files[@]} -gt 0 ] || files=(kernels engine handoff decode_attention router small_kernels kv_fp8 lane)
export -f one
export PYTHON LIMIT logs NAMES=$names
pairs | xargs -P "$JOBS" -L 1 bash -c 'one "$@"' one
