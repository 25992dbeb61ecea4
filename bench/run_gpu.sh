#!/usr/bin/env bash
# Everything a GPU machine is needed for, in one go of under 9 minutes: build, the tests marked gpu,
# compute-sanitizer on all kernels, the tables of bench/step.py and bench/gemm.py, profiler counters of the main kernels.
#
#   bench/run_gpu.sh [FOLDER]      # where the logs go; the tables go to bench/results/ and are copied there
#
# A part that fails does not stop the others; the summary at the end lists them, and the exit status is 1 if any failed,
# was stopped or found no time. A tool that is absent is listed and no failure.
# PYTHON chooses the interpreter (python3), which needs torch with CUDA and a CUDA toolkit beside it.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOGS=${1:-build/gpu}
mkdir -p "$LOGS" bench/results
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
summary=()
failed=0

# Seconds of each part, in all less than 9 minutes. What a part leaves, those after it may use.
declare -A limit=([build]=140 [tests-wgmma]=25 [tests]=65 [step]=75 [memcheck]=25 [racecheck]=25 [ncu]=30 [gemm]=60
  [wgmma]=30 [memcheck-gemm]=15 [racecheck-gemm]=15 [tests-triton]=30)
reserved=0 # of the parts to come
for seconds in "${limit[@]}"; do reserved=$((reserved + seconds)); done
DEADLINE=$((SECONDS + reserved))

# part NAME COMMAND...: runs it with its output in $LOGS/NAME.log.
part() {
  local name=$1 start=$SECONDS rc=0
  shift
  reserved=$((reserved - limit[$name]))
  local left=$((DEADLINE - SECONDS - reserved))
  if ((left < 10)); then
    summary+=("$name: left out, no time left")
    failed=1
    return 1
  fi
  echo "== $name"
  timeout -k 5 "$left" "$@" >"$LOGS/$name.log" 2>&1 || rc=$?
  tail -n "${TAIL:-6}" "$LOGS/$name.log"
  case $rc in
    0) summary+=("$name: ok, $((SECONDS - start)) s") ;;
    124 | 137) summary+=("$name: STOPPED after $((SECONDS - start)) s, see $LOGS/$name.log") ;;
    *) summary+=("$name: FAILED ($rc), see $LOGS/$name.log") ;;
  esac
  ((rc == 0)) || failed=1
  return $rc
}

# absent TOOL PART...: the parts cannot run; their time is for the others.
absent() {
  local tool=$1 name
  shift
  for name in "$@"; do reserved=$((reserved - limit[$name])); done
  summary+=("$*: $tool is absent")
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

if part build env QUANTOPT_CUDA=1 QUANTOPT_CUDA_ARCHS="$arch" "$PYTHON" setup.py build_ext --inplace; then
  # -o addopts=: the options of pyproject.toml name plugins that may be absent here
  pytest=("$PYTHON" -m pytest -o addopts= -p no:cacheprovider -q -m gpu --continue-on-collection-errors)
  # A kernel whose warps wait for each other may never end: alone first, and turned off for the rest if it fails.
  part tests-wgmma "${pytest[@]}" tests/test_cuda_binary.py -k wgmma || export QUANTOPT_WGMMA=0
  part tests "${pytest[@]}" tests --ignore tests/test_triton.py
  TAIL=40 part step "$PYTHON" bench/step.py --device cuda
  sanitizer=$(tool compute-sanitizer)
  # else overruns between small tensors stay inside one block
  checked=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --error-exitcode 1 --tool)
  if [[ -n $sanitizer ]]; then
    part memcheck "${checked[@]}" memcheck "$PYTHON" bench/small_steps.py
    part racecheck "${checked[@]}" racecheck "$PYTHON" bench/small_steps.py
  fi
  ncu=$(tool ncu)
  if [[ -n $ncu ]]; then
    TAIL=60 part ncu "$ncu" --clock-control none -k 'regex:(step|row)_kernel' --metrics \
      gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,smsp__issue_active.avg.pct,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread \
      "$PYTHON" bench/small_steps.py --profile
  else
    absent ncu ncu
  fi
  TAIL=60 part gemm "$PYTHON" bench/gemm.py --device cuda --min-time 0.2
  if [[ ${QUANTOPT_WGMMA:-1} != 0 && $arch == 90 ]]; then
    TAIL=60 part wgmma "$PYTHON" bench/gemm.py --device cuda --only wgmma --min-time 0.2
  else
    absent wgmma wgmma
  fi
  if [[ -n $sanitizer ]]; then
    for check in memcheck racecheck; do
      part "$check-gemm" "${checked[@]}" "$check" "${pytest[@]}" tests/test_cuda_binary.py -k every_shape_on_the_device
    done
  else
    absent compute-sanitizer memcheck racecheck memcheck-gemm racecheck-gemm
  fi
  part tests-triton "${pytest[@]}" tests/test_triton.py # last: it compiles a kernel for every case
  cp bench/results/step-*.json bench/results/{gemm,wgmma}-*.json "$LOGS"/ 2>/dev/null
fi

printf '%s\n' "" "== summary, $((SECONDS)) s" "${summary[@]}" | tee "$LOGS/summary.txt"
exit $failed
