#!/usr/bin/env bash
# Tokenization, one array task a file of the input: sbatch --array=0-9 [OPTION...] slurm/data.sh KEY=VALUE...
# The words are those of data_pipeline.tokenize.
# Check: bash slurm/data.sh --check KEY=VALUE...
#
# `output` is a folder here: raw/web.jsonl becomes OUTPUT/web.bin and its like. Started again, a task
# goes on from what it committed. slurm/pipeline.sh counts the files for --array.
#SBATCH --job-name=data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

JOB=data
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/common.sh || ! -f data_pipeline/tokenize.py ]]; then
    echo "error: $PWD is not the repository of ring_train (no slurm/common.sh there); submit from its top folder" >&2
    exit 2
fi
. slurm/common.sh

if [[ ${1:-} == --check ]]; then
    check_on_login_node "${@:2}"
fi
tokenize "$@"
