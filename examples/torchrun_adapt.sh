#!/usr/bin/env bash
# Adapt in several processes on one machine: each batch is shared among them, and the result is one run.
#
#   examples/torchrun_adapt.sh birds runs/birds                          # two processes on the CPU
#   PROCESSES=4 examples/torchrun_adapt.sh birds runs/birds --method pgn --backbone clip-vit-b16 --image-size 112
#
# DATA OUT [FLAGS of `fastprompt adapt`]. On a machine with GPUs each process takes one (NCCL); without, they meet over
# gloo. Run the same command again after a crash, with any number of processes: it goes on.
# Needs `pip install 'fastprompt[distributed]'`.
set -euo pipefail
data=${1:?usage: torchrun_adapt.sh DATA OUT [FLAGS]} out=${2:?usage: torchrun_adapt.sh DATA OUT [FLAGS]}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node="${PROCESSES:-2}" \
    -m fastprompt adapt --data "$data" --out "$out" --method vpt-deep "${@:3}"
