#!/usr/bin/env bash
# `make test-slurm`: a real Slurm on this machine, real jobs of two nodes with two ranks each.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin

packages=(munge slurmctld slurmd slurm-client shellcheck)
missing=()
for program in munged slurmctld slurmd sbatch shellcheck; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if ((${#missing[@]})); then
    skipped="test-slurm: SKIPPED, real Slurm was not tested: ${missing[*]} not installed"
    if [[ $UID != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "$skipped, and this is not root with apt-get (Debian packages: ${packages[*]})"
        exit 0
    fi
    echo "test-slurm: ${missing[*]} not installed; apt-get install ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get -qq update && apt-get -qq install -y --no-install-recommends "${packages[@]}"; } >/dev/null; then
        echo "$skipped, and apt-get could not install it"
        exit 0
    fi
fi

RING_TRAIN_SLURM=$(mktemp -d /tmp/ring_train_slurm.XXXXXX)
export RING_TRAIN_SLURM
trap 'tools/slurm_down.sh' EXIT
settings=$(PORT=${PORT:-27817} NODES=6 CPUS=4 GPUS=2 tools/slurm_up.sh)
eval "$settings"
.venv/bin/python -m pytest -n 2 --dist loadgroup --timeout 900 tests/slurm_real tests/slurm/test_jobs.py::test_shellcheck_finds_nothing "$@"
