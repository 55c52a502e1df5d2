#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One of these scripts on two or more machines.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: NODE_RANK=N bash examples/multi_node.sh HEAD SCRIPT [key=value ...]

Start it on every machine, from the same folder and in the same environment, with the same words but for NODE_RANK.
Machine 0, whose address HEAD is, starts a Ray cluster, waits for the others and runs SCRIPT with trainer.nnodes added;
the others join, and leave when it has ended. Checkpoints must be on storage that all of them see.

  HEAD           address of machine 0, or address:port (default port 6379)
  NODE_RANK      0 on that machine, 1, 2, ... on the others
  NNODES         how many machines there are (default 2)
  WAIT_SECONDS   how long they wait for each other (default 600)
  RAY_AUTH_MODE  token keeps out who has not the same ~/.ray/auth_token (default disabled, for networks of your own)

for example, on the first and on the second of two machines:
  NODE_RANK=0 bash examples/multi_node.sh 10.0.0.1 examples/qwen2_5_vl_32b_geo3k_grpo.sh
  NODE_RANK=1 bash examples/multi_node.sh 10.0.0.1 examples/qwen2_5_vl_32b_geo3k_grpo.sh
TEXT
}

fail() {
    echo "$1" >&2
    usage >&2
    exit 2
}

case ${1:-} in -h | --help)
    usage
    exit
    ;;
esac
[ $# -ge 2 ] || fail "HEAD and SCRIPT are needed"
[[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || fail "NODE_RANK=${NODE_RANK:-} is not the number of a machine"
[ -f "$2" ] || fail "there is no script $2 in $PWD"
host=${1%:*} port=6379 script=$2 nodes=${NNODES:-2} patience=${WAIT_SECONDS:-600}
[[ $1 = *:* ]] && port=${1##*:}
shift 2

head_answers() { timeout 5 bash -c "exec 3<>/dev/tcp/$host/$port" 2>/dev/null; }

ray_runs() { kill -0 "$ray" 2>/dev/null; }

# Left open, a token on the first machine would have Ray ask the others for it, and they not think of sending it.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when the script has ended, there is nothing to wait for
# With --block, Ray on this machine is one job of this shell, and ends with it.
if [ "$NODE_RANK" -eq 0 ]; then
    ray start --head --node-ip-address="$host" --port="$port" --block &
else
    until head_answers; do
        if [ $SECONDS -ge "$patience" ]; then
            echo "nothing answered at $host:$port within $patience s" >&2
            exit 1
        fi
        sleep 1
    done
    ray start --address="$host:$port" --block &
fi
ray=$!
trap 'kill "$ray" 2>/dev/null; wait "$ray" || true' EXIT

if [ "$NODE_RANK" -gt 0 ]; then
    while ray_runs && head_answers; do sleep 5; done
    ray_runs
    exit
fi
until head_answers; do
    ray_runs || exit
    sleep 1
done
export RAY_ADDRESS="$host:$port"
python3 - "$nodes" "$patience" <<'PYTHON'
import sys
import time

import ray

nodes, patience, start = int(sys.argv[1]), int(sys.argv[2]), time.monotonic()
ray.init(logging_level="ERROR")
while (present := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() - start > patience:
        sys.exit(f"only {present} of {nodes} machines came within {patience} s")
    time.sleep(1)
PYTHON
bash "$script" trainer.nnodes="$nodes" "$@"
