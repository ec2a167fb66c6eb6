#!/usr/bin/env bash
# An export to a Hugging Face folder: sbatch [OPTION...] slurm/export.sh KEY=VALUE...
# The words are those of ring_train.jobs.export.
# Check: bash slurm/export.sh --check KEY=VALUE...
#
# Several ranks share the reading and writing; no GPU is used.
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

JOB="export"
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f slurm/common.sh || ! -f ring_train/jobs/export.py ]]; then
    echo "error: $PWD is not the repository of ring_train (no slurm/common.sh there); submit from its top folder" >&2
    exit 2
fi
. slurm/common.sh

if [[ ${1:-} == --check ]]; then
    check_on_login_node "${@:2}"
fi
export_folder "$@"
