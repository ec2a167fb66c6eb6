#!/usr/bin/env bash
# What a pretraining maps, ahead of it: sbatch [OPTION...] slurm/build_index.sh KEY=VALUE...
# The words are those of ring_train.jobs.build_index.
#
# Takes the words of slurm/pretrain.sh; one process, no GPU.
#SBATCH --job-name=build_index
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

JOB=build_index
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/common.sh || ! -f ring_train/jobs/build_index.py ]]; then
    echo "error: $PWD is not the repository of ring_train (no slurm/common.sh there); submit from its top folder" >&2
    exit 2
fi
. slurm/common.sh

build_index "$@"
