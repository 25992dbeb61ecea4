#!/usr/bin/env bash
# Everything a GPU machine is needed for, in one go of under 9 minutes: build, the tests marked gpu, compute-sanitizer on
# the kernels, the tables of bench/{step,gemm,conv_cuda}.py, profiler counters of the main kernels.
#
#   bench/run_gpu.sh [FOLDER]      # where the logs go; the tables go to bench/results/ and are copied there
#
# A part that fails, is stopped or is left out does not stop the others; the summary at the end lists it, and the
# script exits with 1.
# PYTHON chooses the interpreter (python3), which needs torch with CUDA and a CUDA toolkit beside it.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOGS=${1:-build/gpu}
DEADLINE=$((SECONDS + 525))
mkdir -p "$LOGS" bench/results
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
summary=()
failed=0

# part NAME SECONDS COMMAND...: runs it with its output in $LOGS/NAME.log, within its time and what is left.
part() {
  local name=$1 limit=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) rc=0
  shift 2
  if ((left < 10)); then
    summary+=("$name: LEFT OUT, no time left")
    failed=1
    return 1
  fi
  echo "== $name"
  timeout -k 5 "$((left < limit ? left : limit))" "$@" >"$LOGS/$name.log" 2>&1 || rc=$?
  tail -n "${TAIL:-6}" "$LOGS/$name.log"
  case $rc in
    0) summary+=("$name: ok, $((SECONDS - start)) s") ;;
    124 | 137) summary+=("$name: STOPPED after $((SECONDS - start)) s, see $LOGS/$name.log") ;;
    *) summary+=("$name: FAILED ($rc), see $LOGS/$name.log") ;;
  esac
  ((rc == 0)) || failed=1
  return $rc
}

# tool_part NAME SECONDS TOOL ARGUMENTS...: a part that is run by a tool of the CUDA toolkit.
tool_part() {
  local name=$1 limit=$2 tool=$3 path
  shift 3
  path=$(command -v "$tool" || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/"$tool" /opt/nvidia/nsight-compute/*/"$tool" 2>/dev/null | head -n 1)
  if [[ -z $path ]]; then
    summary+=("$name: LEFT OUT, $tool is absent")
    failed=1
    return 1
  fi
  part "$name" "$limit" "$path" "$@"
}

if ! nvidia-smi -L; then
  echo "run_gpu.sh: no NVIDIA GPU here" >&2
  exit 1
fi

# For this machine's architecture alone: the others are compiled elsewhere.
arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
# An in-place build finds quantopt.kernels in kernels/ through a link; an editable install needs none.
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("quantopt.kernels") is None)'; then
  ln -s ../kernels quantopt/kernels
  trap 'rm -f quantopt/kernels' EXIT
fi

# The limits add up to less than the deadline: no part takes the time of another.
if part build 80 env QUANTOPT_CUDA=1 QUANTOPT_CUDA_ARCHS="$arch" "$PYTHON" setup.py build_ext --inplace; then
  # -o addopts=: the options of pyproject.toml name plugins that may be absent here
  pytest=("$PYTHON" -m pytest -o addopts= -p no:cacheprovider -q -m gpu --continue-on-collection-errors)
  # A kernel whose warps wait for each other may never end: alone first, and turned off for the rest if it fails.
  part tests-wgmma 25 "${pytest[@]}" tests/test_cuda_products_device.py -k wgmma || export QUANTOPT_WGMMA=0
  part tests 70 "${pytest[@]}" tests -k "not wgmma" --ignore-glob "tests/test_triton*"
  # Triton compiles a kernel for every case: those of `brief` alone, of which there is one of each kind
  part tests-triton 35 "${pytest[@]}" tests/test_triton*.py -m "gpu and brief"
  TAIL=60 part step 100 "$PYTHON" bench/step.py --device cuda
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else overruns between small tensors stay inside one block
  for check in memcheck racecheck; do
    tool_part "$check" 30 compute-sanitizer --tool "$check" --error-exitcode 1 "$PYTHON" bench/small_steps.py --brief
    tool_part "$check-gemm" 20 compute-sanitizer --tool "$check" --error-exitcode 1 \
      "${pytest[@]}" tests/test_cuda_products_device.py -k every_shape_on_the_device
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  TAIL=60 tool_part ncu 25 ncu --clock-control none -k 'regex:(step|row)_kernel' --metrics \
    gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,smsp__issue_active.avg.pct,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread \
    "$PYTHON" bench/small_steps.py --profile
  TAIL=60 part gemm 40 "$PYTHON" bench/gemm.py --device cuda --min-time 0.1
  TAIL=60 part conv 20 "$PYTHON" bench/conv_cuda.py --size 32 --batch 64 --min-time 0.1
  if [[ $arch == 90 && ${QUANTOPT_WGMMA:-1} != 0 ]]; then
    TAIL=60 part wgmma 25 "$PYTHON" bench/gemm.py --device cuda --only wgmma --min-time 0.1
  else
    summary+=("wgmma: left out, for compute capability 9.0 alone and where its tests pass")
  fi
  cp bench/results/{step,gemm,conv,wgmma}-*.json "$LOGS"/ 2>/dev/null
fi

printf '%s\n' "" "== summary, $((SECONDS)) s" "${summary[@]}" | tee "$LOGS/summary.txt"
exit $failed
