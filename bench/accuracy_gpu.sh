#!/usr/bin/env bash
# The CIFAR-10 accuracy of every recipe on a GPU, three seeds each, in pieces of 9 minutes:
#
#   bench/accuracy_gpu.sh DATA [OUT] [MINUTES]      # until it exits with 0; 3: unfinished, the same command continues
#
# Runs checkpoint after every epoch. The 1-bit rows of the three networks come first, then those of the paper's networks.
# Finished recipes are in OUT/accuracy.json and OUT/curves.png, and copied to bench/results/ as accuracy-GPU.json when all are.
#
# PYTHON: the interpreter (python3). JOBS: runs side by side (3). SPEED: options of `quantopt sweep` that the first piece's
# bench/train.py shows to be worth it, such as "--cuda-graph" or "--compile"; the same in every piece.
set -uo pipefail
cd "$(dirname "$0")/.."

DATA=${1:?the CIFAR-10 archive or folder}
OUT=${2:-build/accuracy}
MINUTES=${3:-9}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$OUT"

started=$SECONDS
if [[ ! -e $OUT/speed.json ]]; then
  "$PYTHON" bench/train.py --device cuda --modes eager compile graph compile-graph --json "$OUT/speed.json" || exit
fi
left=$(awk "BEGIN { print $MINUTES - ($SECONDS - $started) / 60 }")

networks=(resnet18 vgg11 vgg16)
recipes=()
for optimizer in stam-1bit askew-1bit sgd binaryconnect-1bit binaryrelax-1bit askew-adam-1bit proxquant-1bit; do
  for network in "${networks[@]}"; do recipes+=("$network-$optimizer"); done
done
# The networks and settings of the paper of AskewSGD. proxquant starts from the runs of sgd.
printed=(askew askew-adam askew-adam-clamp askew-adam-gradient askew-adam-gradient-clamp)
for optimizer in sgd binaryconnect binaryconnect-adam proxquant "${printed[@]}" askew-latent stam; do
  recipes+=("paper-convnet-$optimizer")
done
for network in paper-vgg-small paper-resnet20; do
  for optimizer in sgd binaryconnect binaryconnect-adam askew-adam askew-adam-gradient askew-latent stam; do
    recipes+=("$network-$optimizer")
  done
done
for bits in w4a4 w2a4; do recipes+=("paper-resnet18-askew-adam-$bits" "paper-resnet18-askew-latent-$bits"); done
recipes+=(paper-resnet18-sgd paper-resnet18-luq-w4a4 resnet18-askew-w4a4 resnet18-luq)
for bits in ternary 2bit 4bit; do
  for network in "${networks[@]}"; do
    for optimizer in stam askew; do recipes+=("$network-$optimizer-$bits"); done
  done
done

# shellcheck disable=SC2086  # SPEED is a list of options
"$PYTHON" -m quantopt sweep "${recipes[@]}" --data "$DATA" --device cuda --seeds 3 --jobs "${JOBS:-3}" \
  --minutes "$left" --out "$OUT" ${SPEED:-}
status=$?
if ((status == 0)); then
  name=$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')
  cp "$OUT/accuracy.json" "bench/results/accuracy-$name.json"
fi
exit $status
