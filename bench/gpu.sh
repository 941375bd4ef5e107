#!/usr/bin/env bash
# Everything that is to be known about the GPU kernels, on a machine with a GPU and without a network:
#
#   bench/gpu.sh build|test|bench|model|all [--dry-run] [FOLDER]
#
# build   compiles the extension with CUDA, in place, with what is installed: no build isolation, nothing is fetched
# test    the whole test suite on the device; compute-sanitizer memcheck and racecheck on small cases
# bench   guards (syncs, recompilations, repeatability, CUDA graphs); tables T1 to T5, T7, A, B, C and S, a share of 5 minutes each, their
#         most wanted cases first. TABLES="T1 T2" measures these at length; results of several calls add up in one FOLDER. Beside PyTorch's
#         own ways stand those kernels of other projects that are installed (bench/gpu/others.py); WITHOUT="vllm deep_gemm" leaves these
#         out, such as one that breaks the device for all that follow
# model   forward, generation and training step of the mini geometry, random weights
#
# Each part takes less than 8 minutes, writes its log and JSON files under FOLDER (default: gpu-results) and stands for itself: a part
# that fails leaves the results of the others. The exit status says whether a part failed. --dry-run goes through all of it with tiny
# shapes on a machine without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

PART=${1:-all}
shift || true
DRY=()
if [ "${1:-}" = "--dry-run" ]; then
  DRY=(--dry-run)
  shift
fi
OUT=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
PYTHON=${PYTHON:-python3}
JSON="$OUT/results.json"
failed=()

# step NAME SECONDS COMMAND...: runs it within its time, keeps its output, notes a failure and goes on
step() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "== $name: $*"
  if timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    echo "   ok, $((SECONDS - begin)) s"
  else
    echo "   FAILED (status $?), $((SECONDS - begin)) s; the end of $OUT/$name.log:"
    tail -n 15 "$OUT/$name.log" | sed 's/^/   | /'
    failed+=("$name")
  fi
}

build() {
  if [ ${#DRY[@]} -gt 0 ]; then # the CUDA build is a step of CI of its own: here what is built already serves
    step build 460 "$PYTHON" -c "from llada_kernels import _library; assert _library.load_error is None, _library.load_error"
  else
    step build 460 env LLADA_KERNELS_CUDA=on "$PYTHON" setup.py build_ext --inplace
  fi
  step info 60 bash -c "'$PYTHON' -m llada_kernels.info --json >'$OUT/info.json'"
}

# one_file PATH: the tests of one file; that there are none for this machine is no failure
one_file() {
  local output status
  output=$("$PYTHON" -m pytest -q -p no:cacheprovider "$1" 2>&1)
  status=$?
  printf '\n== %s\n%s\n' "$1" "$output"
  [ $status -eq 0 ] || [ $status -eq 5 ]
}
export -f one_file
export PYTHON

run_tests() {
  if [ ${#DRY[@]} -gt 0 ]; then
    step tests 250 bash -c "one_file python_tests/ops/test_swiglu.py"
    step once 60 "$PYTHON" -m bench.gpu once "${DRY[@]}"
  else
    # Several files at a time, those first that run kernels: compiling them takes most of the time. A file that cannot even be imported
    # (rare packages may be missing) takes no other with it.
    step tests 250 env OMP_NUM_THREADS=2 bash -c \
      "ls python_tests/triton/values/test_*.py python_tests/ops/test_*.py \$(find python_tests -name 'test_*.py' ! -path '*/values/*' ! -path '*/ops/*') |
       xargs -P ${JOBS:-8} -n 1 bash -c 'one_file \"\$0\"'"
    # Compiled kernels are kept: what follows is not to compile under the eyes of a tool.
    step once 60 "$PYTHON" -m bench.gpu once
  fi
  local tool
  for tool in memcheck racecheck; do
    if [ ${#DRY[@]} -gt 0 ]; then
      step "$tool" 75 "$PYTHON" -m bench.gpu once "${DRY[@]}"
    elif command -v compute-sanitizer >/dev/null; then
      # PyTorch keeps freed memory, where an access out of bounds would not be seen: each tensor gets an allocation of its own
      step "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m bench.gpu once
    else
      echo "== $tool: compute-sanitizer is not installed" | tee "$OUT/$tool.log"
      failed+=("$tool")
    fi
  done
}

bench() {
  local module without=()
  for module in ${WITHOUT:-}; do
    without+=(--without "$module")
  done
  step guards 130 "$PYTHON" -m bench.gpu guards --json "$JSON" "${DRY[@]}"
  # shellcheck disable=SC2086 # several names
  step tables 345 "$PYTHON" -m bench.gpu tables ${TABLES:-} --json "$JSON" --budget "${BUDGET:-300}" "${without[@]}" "${DRY[@]}"
}

model() {
  step model 470 "$PYTHON" -m bench.gpu tables E --json "$JSON" --budget "${BUDGET:-400}" "${DRY[@]}"
}

if [ ${#DRY[@]} -gt 0 ]; then
  export TRITON_INTERPRET=1
fi
case $PART in
  build) build ;;
  test) run_tests ;;
  bench) bench ;;
  model) model ;;
  all)
    build
    run_tests
    bench
    model
    ;;
  *)
    echo "unknown part $PART: expected build, test, bench, model or all" >&2
    exit 2
    ;;
esac
echo "results: $OUT"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
