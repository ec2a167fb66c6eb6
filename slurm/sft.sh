#!/usr/bin/env bash
# Train: sbatch [OPTION...] slurm/sft.sh KEY=VALUE...     the words of ring_train.jobs.sft
# Check: bash slurm/sft.sh --check [OPTION...] KEY=VALUE...     on the login node, in seconds
#
# Options of sbatch override these. One rank a GPU; every rank sees all GPUs of its node.
#SBATCH --job-name=sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

JOB=sft
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/common.sh || ! -f ring_train/jobs/$JOB.py ]]; then
    echo "error: $PWD is not the repository of ring_train (no slurm/common.sh there); submit from its top folder" >&2
    exit 2
fi
. slurm/common.sh

if [[ ${1:-} == --check ]]; then
    check_on_login_node "${@:2}"
fi
train "$@"
