#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One of these scripts on two or more machines.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: NODE_RANK=N bash examples/multi_node.sh HEAD SCRIPT [key=value ...]

Start it on every machine, in the repository's root and in the same environment. The arguments are the same; only
NODE_RANK differs. HEAD is the address of machine 0. Machine 0 starts a Ray cluster, waits for the others, and runs
SCRIPT with trainer.nnodes added. The others join, and leave when SCRIPT has ended. Checkpoints have to be on storage
that all machines see.

Anyone who reaches a Ray cluster can run code in it. This cluster therefore asks for a token. Machine 0 writes a random
token to a file (mode 0600), and the others read it there. The file is in the repository's root, or where
RAY_AUTH_TOKEN_PATH says. If not all machines see that place, copy a file of your own to each of them, run chmod 600 on
it, and name it in RAY_AUTH_TOKEN_PATH.

  HEAD                 address of machine 0, or address:port (default port 6379)
  NODE_RANK            0 on that machine, 1, 2, ... on the others
  NNODES               how many machines there are (default 2)
  WAIT_SECONDS         how long machines wait for each other (default 600)
  RAY_AUTH_TOKEN_PATH  the token's file (default .ray_auth_token_HEAD_PORT in the root; gone when SCRIPT has ended)
  RAY_AUTH_MODE        disabled lets in everybody who reaches the machines (default token)

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

made_token=
clean_up() {
    [ -z "${ray:-}" ] || { kill "$ray" 2>/dev/null && wait "$ray"; } || true
    [ -z "$made_token" ] || rm -f "$made_token"
}
trap clean_up EXIT

wait_for_head() {
    until head_answers; do
        if [ $SECONDS -ge "$patience" ]; then
            echo "nothing answered at $host:$port within $patience s" >&2
            exit 1
        fi
        sleep 1
    done
}

# A file that an earlier run left is used again: the other machines may have read it already.
make_token() {
    [ -s "$1" ] || (umask 077 && head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$1.part" && mv "$1.part" "$1")
}

wait_for_token() {
    [ -s "$1" ] || echo "waiting for machine 0's token in $1, which has to be on storage that all machines see"
    until [ -s "$1" ]; do
        if [ $SECONDS -ge "$patience" ]; then
            echo "no token in $1 within $patience s; RAY_AUTH_TOKEN_PATH says where it is" >&2
            exit 1
        fi
        sleep 1
    done
}

[ "$NODE_RANK" -eq 0 ] || wait_for_head
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    own_token="$PWD/.ray_auth_token_${host}_$port"
    export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$own_token}"
    if [ "$NODE_RANK" -gt 0 ]; then
        wait_for_token "$RAY_AUTH_TOKEN_PATH"
    else
        [ -s "$RAY_AUTH_TOKEN_PATH" ] && [ "$RAY_AUTH_TOKEN_PATH" != "$own_token" ] || made_token=$RAY_AUTH_TOKEN_PATH
        make_token "$RAY_AUTH_TOKEN_PATH"
    fi
    [[ $(stat -Lc %a "$RAY_AUTH_TOKEN_PATH") = ?00 ]] ||
        fail "others can read the token in $RAY_AUTH_TOKEN_PATH; run chmod 600 on it"
fi
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when the script has ended, there is nothing to wait for
# With --block, Ray on this machine is one job of this shell, and ends with it.
if [ "$NODE_RANK" -eq 0 ]; then
    ray start --head --node-ip-address="$host" --port="$port" --block &
else
    ray start --address="$host:$port" --block &
fi
ray=$!

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
