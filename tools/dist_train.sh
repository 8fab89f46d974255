#!/usr/bin/env bash
# Trains on several GPUs or machines:  tools/dist_train.sh CONFIG GPUS [options of mmsoftpool train]
# On each of several machines: NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist_train.sh ...
# GPUS is the number of GPUs per machine. Without a GPU it is the number of processes, which use gloo.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$2" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
  -m mmsoftpool train "$1" --launcher pytorch "${@:3}"
