#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One of these scripts as a job of Slurm, on any number of machines.
#SBATCH --job-name=verl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%j.log
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: sbatch [options of Slurm] examples/slurm.sh SCRIPT [key=value ...]

Submit it from the repository's root, with the run's environment active. It starts examples/multi_node.sh once on every
machine of the job. The first one is machine 0. The repository and the checkpoints have to be on storage that all
machines see. Options on the command line override those in the file:

  sbatch --nodes=4 --time=24:00:00 examples/slurm.sh examples/qwen2_5_vl_32b_geo3k_grpo.sh trainer.save_freq=5

A job ends at once at its time limit. Submitted again, it continues from its last checkpoint. trainer.save_freq says
how often one is written.

  VERL_ACTIVATE  what to source on every machine first, such as .venv/bin/activate
  VERL_IMAGE     an image for srun's --container-image (Pyxis), with the repository mounted at the same path
  VERL_PORT      of the Ray cluster on machine 0 (default 20000 and the last four digits of the job's number)
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
[ $# -ge 1 ] || fail "SCRIPT is needed"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no job of Slurm: hand it to sbatch"
[ -f examples/multi_node.sh ] || fail "there is no examples/multi_node.sh in $PWD; submit from the repository's root"
[ -f "$1" ] || fail "there is no script $1 in $PWD"

# One task a machine, with all of its cores: by itself, a task would be bound to one of them.
step=(srun --ntasks-per-node=1 --cpu-bind=none)
[ -z "${VERL_IMAGE:-}" ] ||
    step+=(--container-image="$VERL_IMAGE" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${machines[0]}
head_address=$("${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head_node" hostname -I | awk '{print $1}')
head=$head_address:${VERL_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
echo "machine 0 is $head_node, at $head"

export NNODES=$SLURM_JOB_NUM_NODES
# shellcheck disable=SC2016  # for the shell of each task
"${step[@]}" --nodes="$NNODES" --ntasks="$NNODES" --kill-on-bad-exit=1 bash -c '
    [ -z "${VERL_ACTIVATE:-}" ] || source "$VERL_ACTIVATE"
    NODE_RANK=$SLURM_PROCID exec bash examples/multi_node.sh "$@"
' task "$head" "$@"
