#!/usr/bin/env bash
# End the cluster of tools/slurm_up.sh: its jobs, then exactly the daemons that its pid files name.
set -uo pipefail

state=${RING_TRAIN_SLURM:-/tmp/ring_train_slurm.$UID}
export SLURM_CONF=$state/slurm.conf

is_ours() { # PID NAME -> whether the process is that program
    [[ -n $1 && -r /proc/$1/comm && $(<"/proc/$1/comm") == "$2"* ]]
}

stop() { # PID_FILE NAME
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    is_ours "$pid" "$2" && kill "$pid"
    for ((tries = 0; tries < 100; tries++)); do
        is_ours "$pid" "$2" || break
        sleep 0.1
    done
    is_ours "$pid" "$2" && kill -9 "$pid"
    rm -f "$1"
}

if [[ ! -e $SLURM_CONF ]]; then
    echo "slurm_down: nothing is up in $state" >&2
    exit 0
fi
if scontrol ping 2>/dev/null | grep -q 'is UP'; then
    squeue -h -o %A | sort -u | xargs -r scancel
    for ((tries = 0; tries < 300; tries++)); do # or their processes would stay
        [[ -z $(squeue -h 2>/dev/null) ]] && break
        sleep 0.1
    done
fi
for file in "$state"/slurmd-*.pid; do
    [[ -e $file ]] && stop "$file" slurmd
done
stop "$state/slurmctld.pid" slurmctld
stop "$state/munged.pid" munged
rm -rf "$state"
echo "slurm_down: ended" >&2
