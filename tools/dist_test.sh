#!/usr/bin/env bash
# Evaluates on several GPUs:  tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of mmsoftpool test]
# Several machines, and machines without a GPU, work as in tools/dist_train.sh.
# COMMAND=test-dev runs COCO test-dev instead:  COMMAND=test-dev tools/dist_test.sh CONFIG CHECKPOINT GPUS
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$3" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
  -m mmsoftpool "${COMMAND:-test}" "$1" "$2" --launcher pytorch "${@:4}"
