#!/usr/bin/env bash
# One rank: srun runs this once a task, in the repository. `rank.sh MODULE WORD...`
#
# Slurm numbers tasks; torch wants RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.
set -euo pipefail

fail() {
    echo "error: rank ${SLURM_PROCID:-?} on $(hostname): $*" >&2
    exit 2
}

for name in SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_STEP_NUM_TASKS SLURM_STEP_TASKS_PER_NODE MASTER_ADDR MASTER_PORT; do
    [[ -n ${!name:-} ]] || fail "$name is not set; start ranks through sbatch slurm/pretrain.sh and its like"
done

counts=() # ranks of each node, from 2(x3),1
IFS=, read -ra groups <<<"$SLURM_STEP_TASKS_PER_NODE"
for group in "${groups[@]}"; do
    [[ $group =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]] || fail "SLURM_STEP_TASKS_PER_NODE=$SLURM_STEP_TASKS_PER_NODE cannot be read"
    for ((i = 0; i < ${BASH_REMATCH[3]:-1}; i++)); do counts+=("${BASH_REMATCH[1]}"); done
done
total=0
for count in "${counts[@]}"; do total=$((total + count)); done
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
export WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE=${counts[$SLURM_NODEID]:-0}

((total == WORLD_SIZE)) ||
    fail "SLURM_STEP_TASKS_PER_NODE=$SLURM_STEP_TASKS_PER_NODE contradicts SLURM_STEP_NUM_TASKS=$WORLD_SIZE; unset what you exported"
((RANK < WORLD_SIZE)) || fail "SLURM_PROCID=$RANK is not below SLURM_STEP_NUM_TASKS=$WORLD_SIZE; unset what you exported"
((LOCAL_RANK < LOCAL_WORLD_SIZE)) ||
    fail "SLURM_LOCALID=$LOCAL_RANK is not below the $LOCAL_WORLD_SIZE ranks of node $SLURM_NODEID; unset what you exported"
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    if ((${#devices[@]} < LOCAL_WORLD_SIZE)); then
        ((LOCAL_RANK == 0)) || exit 2 # one line a node
        fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has fewer devices than this node has ranks ($LOCAL_WORLD_SIZE); use --gpus-per-node=$LOCAL_WORLD_SIZE, and neither --gpus-per-task nor --gpu-bind"
    fi
fi

. slurm/environment.sh
exec "${RING_TRAIN_PYTHON:?}" -m "$@"
