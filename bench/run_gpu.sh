#!/usr/bin/env bash
# Everything a GPU machine is needed for, in one go of under 9 minutes: build, the tests marked gpu,
# compute-sanitizer on all kernels, the tables of bench/step.py and bench/gemm.py, profiler counters of the main kernels.
#
#   bench/run_gpu.sh [FOLDER]      # where the logs go; the tables go to bench/results/ and are copied there
#
# A part that fails, or a tool that is absent, does not stop the others; the summary at the end lists them.
# PYTHON chooses the interpreter (python3), which needs torch with CUDA and a CUDA toolkit beside it.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOGS=${1:-build/gpu}
DEADLINE=$((SECONDS + 525))
mkdir -p "$LOGS" bench/results
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
summary=()

# part NAME SECONDS COMMAND...: runs it with its output in $LOGS/NAME.log, within its time and what is left.
part() {
  local name=$1 limit=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) rc=0
  shift 2
  if ((left < 10)); then
    summary+=("$name: left out, no time left")
    return 1
  fi
  echo "== $name"
  timeout -k 5 "$((left < limit ? left : limit))" "$@" >"$LOGS/$name.log" 2>&1 || rc=$?
  tail -n "${TAIL:-6}" "$LOGS/$name.log"
  case $rc in
    0) summary+=("$name: ok, $((SECONDS - start)) s") ;;
    124 | 137) summary+=("$name: stopped after $((SECONDS - start)) s, see $LOGS/$name.log") ;;
    *) summary+=("$name: FAILED ($rc), see $LOGS/$name.log") ;;
  esac
  return $rc
}

# tool NAME: where a tool of the CUDA toolkit is, or nothing.
tool() {
  command -v "$1" || ls /usr/local/cuda/bin/"$1" /opt/nvidia/nsight-compute/*/"$1" 2>/dev/null | head -n 1
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

if part build 240 env QUANTOPT_CUDA=1 QUANTOPT_CUDA_ARCHS="$arch" "$PYTHON" setup.py build_ext --inplace; then
  # -o addopts=: the options of pyproject.toml name plugins that may be absent here
  pytest=("$PYTHON" -m pytest -o addopts= -p no:cacheprovider -q -m gpu --continue-on-collection-errors)
  part tests 120 "${pytest[@]}" tests --ignore tests/test_triton.py
  TAIL=40 part step 200 "$PYTHON" bench/step.py --device cuda
  TAIL=60 part gemm 120 "$PYTHON" bench/gemm.py --device cuda --min-time 0.2
  cp bench/results/step-*.json bench/results/gemm-*.json "$LOGS"/ 2>/dev/null
  sanitizer=$(tool compute-sanitizer)
  if [[ -n $sanitizer ]]; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else overruns between small tensors stay inside one block
    for check in memcheck racecheck; do
      part "$check" 70 "$sanitizer" --tool "$check" --error-exitcode 1 \
        "$PYTHON" bench/small_steps.py
      part "$check-gemm" 60 "$sanitizer" --tool "$check" --error-exitcode 1 \
        "${pytest[@]}" tests/test_cuda_binary.py -k every_shape_on_the_device
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  else
    summary+=("memcheck, racecheck: compute-sanitizer is absent")
  fi
  ncu=$(tool ncu)
  if [[ -n $ncu ]]; then
    TAIL=60 part ncu 60 "$ncu" --clock-control none -k 'regex:(step|row)_kernel' --metrics \
      gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,smsp__issue_active.avg.pct,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread \
      "$PYTHON" bench/small_steps.py --profile
  else
    summary+=("ncu: absent")
  fi
  part tests-triton 150 "${pytest[@]}" tests/test_triton.py # last: it compiles a kernel for every case
fi

printf '%s\n' "" "== summary, $((SECONDS)) s" "${summary[@]}" | tee "$LOGS/summary.txt"
! grep -q FAILED "$LOGS/summary.txt"
