#!/usr/bin/env bash
# Evaluates on several GPUs:  tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# Several machines, and machines without a GPU, work as in tools/dist_train.sh.
# TOOL=test_dev.py runs COCO test-dev instead:  TOOL=test_dev.py tools/dist_test.sh CONFIG CHECKPOINT GPUS
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$3" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
  "$(dirname "$0")/${TOOL:-test.py}" "$1" "$2" --launcher pytorch "${@:4}"
