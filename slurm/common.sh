# What the jobs of this folder share: to be sourced from the repository, inside a job or for --check.
# shellcheck shell=bash
#
# Exit status of a job: 0 done; 2 a mistake of a person, nothing to try again; 75 stopped before the
# end, to be started again (never 0: jobs that wait for this one must not be released); others failed.

. slurm/environment.sh

readonly USER_ERROR=2 STOPPED=75
readonly MAX_IDLE_STARTS=3 # starts one after another that bring the run no further, before it is given up
readonly MAX_REQUEUES=20   # of a job without a journal
readonly PAUSE_S=${RING_TRAIN_PAUSE_S:-2} # between the death of ranks and their next start
readonly WAIT_S=${RING_TRAIN_WAIT_S:-60} # from the end of the first rank until those that still run are killed

stop_signal= # the first signal that asked this job to stop
interrupted= # a signal has ended `wait` early
ranks=       # process of the srun that runs

say() { echo "ring_train: $*"; }

fail() {
    echo "error: $*" >&2
    exit $USER_ERROR
}

read_allocation() { # sets NUM_NODES and TASKS_PER_NODE from SLURM_*
    [[ -n ${SLURM_JOB_ID:-} ]] ||
        fail "SLURM_JOB_ID is not set, so this is no Slurm job; submit it (sbatch slurm/$JOB.sh ...) or check it here (bash slurm/$JOB.sh --check ...)"
    local name
    for name in SLURM_JOB_NUM_NODES SLURM_TASKS_PER_NODE SLURM_JOB_NODELIST; do
        [[ -n ${!name:-} ]] || fail "$name is not set in job $SLURM_JOB_ID; let sbatch set it, and unset no SLURM_* variable"
    done
    # shellcheck disable=SC2153  # Slurm sets this and SLURM_NTASKS_PER_NODE
    local per_node=$SLURM_TASKS_PER_NODE
    [[ $SLURM_JOB_NUM_NODES =~ ^[1-9][0-9]*$ ]] ||
        fail "SLURM_JOB_NUM_NODES=$SLURM_JOB_NUM_NODES is not a number of nodes; let sbatch set it"
    # 2(x3) or 2: the same number on every node; 2,1 or 2(x3),1: not.
    [[ $per_node =~ ^([1-9][0-9]*)(\(x([1-9][0-9]*)\))?$ ]] ||
        fail "SLURM_TASKS_PER_NODE=$per_node: nodes differ in their number of ranks; ask for the same on each with --ntasks-per-node, and leave --ntasks out"
    NUM_NODES=$SLURM_JOB_NUM_NODES TASKS_PER_NODE=${BASH_REMATCH[1]}
    [[ ${BASH_REMATCH[3]:-1} == "$NUM_NODES" ]] ||
        fail "SLURM_TASKS_PER_NODE=$per_node contradicts SLURM_JOB_NUM_NODES=$NUM_NODES; let sbatch set both"
    [[ -z ${SLURM_NTASKS_PER_NODE:-} || $SLURM_NTASKS_PER_NODE == "$TASKS_PER_NODE" ]] ||
        fail "SLURM_NTASKS_PER_NODE=$SLURM_NTASKS_PER_NODE contradicts SLURM_TASKS_PER_NODE=$per_node; let sbatch set both"
}

ask_slurm() { # FORMAT: prints what squeue says of this job, or nothing if the controller stays silent
    local tries answer
    for ((tries = 0; tries < 15; tries++)); do
        answer=$(squeue -h -j "$SLURM_JOB_ID" -o "$1" 2>/dev/null) || true
        [[ -z $answer ]] || break
        sleep "$PAUSE_S"
    done
    echo "$answer"
}

set_deadline() { # exports when Slurm will kill the job, so that the trainer stops early enough
    local tries text
    for ((tries = 0; tries < 5; tries++)); do
        [[ $(ask_slurm %l) != UNLIMITED ]] || break
        text=$(ask_slurm %e)
        if [[ $text == [0-9]* ]]; then
            RING_TRAIN_DEADLINE=$(date -d "$text" +%s)
            export RING_TRAIN_DEADLINE
            return
        fi
        sleep 1 # the end is not known yet in the first moments of a job
    done
    unset RING_TRAIN_DEADLINE
}

set_rendezvous() { # exports where rank 0 of this job listens
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # The address by which Slurm itself reaches the node: names alone do not resolve everywhere.
    : "${MASTER_ADDR:=$(scontrol -o show node "${hosts[0]:-}" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}"
    : "${MASTER_ADDR:=${hosts[0]:-}}"
    # One port a job, below those that the kernel hands out (32768 and above).
    : "${MASTER_PORT:=$((15000 + SLURM_JOB_ID % 15000))}"
    export MASTER_ADDR MASTER_PORT
}

set_launcher() { # [FOLDER]: sets CONTAINER, options of srun, and INSIDE, words before a command of the ranks
    CONTAINER=() INSIDE=()
    if [[ -z ${RING_CONTAINER:-} ]]; then
        : "${RING_TRAIN_PYTHON:=$PWD/.venv/bin/python}"
        [[ -x $RING_TRAIN_PYTHON ]] ||
            fail "RING_TRAIN_PYTHON=$RING_TRAIN_PYTHON is not there; run make install in $PWD, or name another Python or a container (RING_CONTAINER=FILE.sqsh or FILE.sif)"
        export RING_TRAIN_PYTHON
        return
    fi
    [[ -f $RING_CONTAINER && -r $RING_CONTAINER ]] ||
        fail "RING_CONTAINER=$RING_CONTAINER is not a file that can be read; give an image.sqsh (enroot, pyxis) or an image.sif (apptainer), or unset it to run on bare metal"
    : "${RING_TRAIN_PYTHON:=python3}"
    export RING_TRAIN_PYTHON PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    local mounts=$PWD:$PWD${RING_CONTAINER_MOUNTS:+,$RING_CONTAINER_MOUNTS}
    [[ -z ${1:-} ]] || mounts+=,$(realpath "$1"):$(realpath "$1") # where results go
    case $RING_CONTAINER in
    *.sqsh) CONTAINER=(--container-image="$RING_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    *.sif)
        command -v apptainer >/dev/null || fail "RING_CONTAINER=$RING_CONTAINER needs apptainer, which is not on the PATH of $(hostname); load its module, or use an image.sqsh"
        INSIDE=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$RING_CONTAINER")
        ;;
    *) fail "RING_CONTAINER=$RING_CONTAINER has neither of the suffixes .sqsh (enroot, pyxis) and .sif (apptainer); rename or convert it" ;;
    esac
}

run_python() { # runs Python once, where the ranks will run
    if ((${#CONTAINER[@]})); then
        srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --export=ALL "${CONTAINER[@]}" "$RING_TRAIN_PYTHON" "$@"
    else
        "${INSIDE[@]}" "$RING_TRAIN_PYTHON" "$@"
    fi
}

check() { # HOW STAGE: WORD...: sets CHECKED to the columns of the answer, or ends the job
    local status=0 lines
    lines=$(run_python slurm/check.py "$@") || status=$?
    ((status != USER_ERROR)) || exit $USER_ERROR # it has said why
    if ((status)); then
        echo "error: the check before the ranks could not run (status $status), see above" >&2
        exit "$status"
    fi
    IFS=$'\t' read -r -a CHECKED <<<"${lines##*$'\n'}"
}

catch_signals() { # from now on a signal ends the job at its next safe point
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
}

on_signal() { # NAME
    stop_signal=${stop_signal:-$1} interrupted=1
    # srun hands USR1 on to every rank; TERM would make it kill them.
    [[ -z $ranks ]] || kill -USR1 "$ranks" 2>/dev/null || true
}

wait_for_ranks() { # returns their status, whatever signals come in between
    local status=0 again
    interrupted=
    wait "$ranks" || status=$?
    while [[ -n $interrupted ]]; do
        interrupted=
        again=0
        wait "$ranks" 2>/dev/null || again=$?
        ((again != 127)) || break # it had ended, and its status is the one before
        status=$again
    done
    ranks=
    return $status
}

run_ranks() { # NODES COMMAND...: runs it in every rank and returns the highest status
    local nodes=$1 hosts place=()
    shift
    if ((nodes < NUM_NODES)); then # the first ones: rank 0 is where MASTER_ADDR says
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        place=(--nodelist="$(IFS=, && echo "${hosts[*]:0:nodes}")")
    fi
    # From 22.05 on srun does not take this over from sbatch.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || place+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    # A dead rank leaves the others WAIT_S to write their stacks; a stop ends all of them with 75.
    srun --nodes="$nodes" --ntasks="$((nodes * TASKS_PER_NODE))" --ntasks-per-node="$TASKS_PER_NODE" \
        --distribution=block --export=ALL --label --kill-on-bad-exit=0 --wait="$WAIT_S" \
        "${place[@]}" "${CONTAINER[@]}" "${INSIDE[@]}" \
        bash slurm/rank.sh "$@" &
    ranks=$!
    [[ -z $stop_signal ]] || on_signal "$stop_signal"
    wait_for_ranks
}

saved_step() { # the step of the newest checkpoint
    local folder newest=0
    for folder in "$RUN_DIR"/checkpoints/step_[0-9]*; do
        [[ $folder =~ /step_0*([0-9]+)$ ]] && ((BASH_REMATCH[1] > newest)) && newest=${BASH_REMATCH[1]}
    done
    echo "$newest"
}

tell_journal() { # EVENT: appends it to RUN_DIR/journal.jsonl
    local attempt
    [[ -z $(tail -c 1 "$RUN_DIR/journal.jsonl" 2>/dev/null) ]] || echo >>"$RUN_DIR/journal.jsonl" # a torn line
    attempt=$(grep -c '"event": "start"' "$RUN_DIR/journal.jsonl" 2>/dev/null) || true
    printf '{"time": %s, "event": "%s", "attempt": %s, "rank": 0, "step": %s, "job_id": "%s"}\n' \
        "$(date +%s.%3N)" "$1" "${attempt:-0}" "$(saved_step)" "$SLURM_JOB_ID" >>"$RUN_DIR/journal.jsonl"
}

told_journal() { # EVENT: prints the lines of this job
    grep "\"event\": \"$1\".*\"job_id\": \"$SLURM_JOB_ID\"" "$RUN_DIR/journal.jsonl" 2>/dev/null || true
}

open_run_folder() { # makes RUN_DIR and puts the log of this job there
    local probe log
    if ! mkdir -p "$RUN_DIR/logs" 2>/dev/null || ! probe=$(mktemp "$RUN_DIR/logs/.probe.XXXXXX" 2>/dev/null); then
        fail "run_dir=$RUN_DIR cannot be written by $(id -un) on $(hostname); choose a folder that can"
    fi
    rm -f "$probe"
    log=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *StdOut=//p')
    [[ -f $log ]] || return 0
    local link=$RUN_DIR/logs/${log##*/}
    [[ $log -ef $link ]] || ln -f "$log" "$link" 2>/dev/null || ln -sf "$(realpath "$log")" "$link"
}

leave_if_finished() { # a requeue after the end must not train on, nor release who waits
    if [[ -n $(told_journal job_done) ]]; then
        echo "error: job $SLURM_JOB_ID was started again, but it has finished the run in $RUN_DIR before (job_done in its journal); nothing was done: submit a new job to go on" >&2
        exit 1
    fi
    if has_finished; then
        tell_journal job_done
        say "the run in $RUN_DIR was finished by this job before it was started again"
        exit 0
    fi
}

has_finished() { # whether ranks of this job have done all that its config asks for
    grep -qs '"state": "finished"' "$RUN_DIR/outcome.json" &&
        grep -qs "\"job_id\": \"$SLURM_JOB_ID\"" "$RUN_DIR/outcome.json"
}

requeue() { # WHERE: has this job started again by Slurm
    local tries
    say "stopped $1; requeueing to go on"
    for ((tries = 0; tries < 5; tries++)); do # the controller may be busy or moving
        ! scontrol requeue "$SLURM_JOB_ID" || exit $STOPPED
        sleep "$PAUSE_S"
    done
    echo "error: job $SLURM_JOB_ID cannot be requeued (see the line above); submit the same command again to go on" >&2
    exit $STOPPED
}

leave_if_slurm_ends_it() { # REASON: a job that is cancelled must stay so
    local state
    state=$(ask_slurm %T) # COMPLETING where Slurm is ending it
    if [[ $state != RUNNING ]]; then
        say "stopped ($1); Slurm itself is ending this job (${state:-unknown state}), so it is not requeued from here"
        exit $STOPPED
    fi
}

leave_to_go_on() { # REASON: requeues a training that gets somewhere
    local step idle=0 line
    leave_if_slurm_ends_it "$1"
    step=$(saved_step)
    while read -r line; do
        if [[ $line == *"\"step\": $step,"* ]]; then idle=$((idle + 1)); else idle=0; fi
    done < <(told_journal job_requeue)
    if ((idle >= MAX_IDLE_STARTS)); then
        echo "error: job $SLURM_JOB_ID was requeued $idle times at step $step of $RUN_DIR without getting further; is the time limit too short for a start, a step and a save?" >&2
        exit 1
    fi
    tell_journal job_requeue
    requeue "($1) at step $step"
}

run_through() { # NODES COMMAND...: runs what keeps no checkpoints, some times if it dies
    local status start
    for ((start = 0; start <= MAX_IDLE_STARTS; start++)); do
        status=0
        if [[ -n $stop_signal ]]; then status=$STOPPED; else run_ranks "$@" || status=$?; fi
        ((status != 0)) || say "done"
        ((status != 0 && status != USER_ERROR)) || exit "$status"
        if [[ -n $stop_signal ]]; then
            leave_if_slurm_ends_it "$stop_signal"
            ((${SLURM_RESTART_COUNT:-0} < MAX_REQUEUES)) || fail "job $SLURM_JOB_ID was requeued $MAX_REQUEUES times and is not done; give it more time"
            requeue "($stop_signal)"
        fi
        say "$JOB ended with status $status"
        sleep "$PAUSE_S"
    done
    exit "$status"
}

supervise() { # NODES COMMAND...: runs the ranks until the run is done or to be given up
    local status step before idle=0
    while true; do
        [[ -z $stop_signal ]] || leave_to_go_on "$stop_signal before the ranks started"
        before=$(saved_step) status=0
        run_ranks "$@" || status=$?
        step=$(saved_step)
        if ((status)) && has_finished; then
            say "the ranks ended with status $status after the last step was saved"
            status=0
        fi
        case $status in
        0)
            tell_journal job_done
            say "done at step $step"
            exit 0
            ;;
        "$USER_ERROR") exit $USER_ERROR ;; # the ranks have said why
        "$STOPPED") leave_to_go_on "${stop_signal:-a signal or the deadline}" ;;
        esac
        [[ -z $stop_signal ]] || leave_to_go_on "$stop_signal, ranks ended with $status"
        if ((step > before)); then idle=0; else idle=$((idle + 1)); fi
        if ((idle > MAX_IDLE_STARTS)); then
            echo "error: the ranks died (status $status) $idle times at step $step of $RUN_DIR without getting further; see $RUN_DIR/journal.jsonl and $RUN_DIR/stacks" >&2
            exit "$status"
        fi
        say "the ranks ended with status $status at step $step; starting them again in this job ($idle of $MAX_IDLE_STARTS starts without progress)"
        sleep "$PAUSE_S"
    done
}

find_python() { # of a login node
    : "${RING_TRAIN_PYTHON:=.venv/bin/python}"
    command -v "$RING_TRAIN_PYTHON" >/dev/null ||
        fail "RING_TRAIN_PYTHON=$RING_TRAIN_PYTHON is not there; a check needs the project's environment: run make install, or name its Python"
}

check_on_login_node() { # [SBATCH OPTION...] WORD...: prints the plan, or why there is none
    find_python
    exec "$RING_TRAIN_PYTHON" slurm/check.py print "$JOB:" "$@"
}

train() { # WORD...: a training run, from its check to its end
    local sizes=() nodes
    read_allocation
    catch_signals
    set_launcher
    for ((nodes = NUM_NODES; nodes > 0; nodes--)); do sizes+=("--world=$((nodes * TASKS_PER_NODE))"); done
    check job "$JOB:" "${sizes[@]}" "$@"
    RUN_DIR=${CHECKED[1]} nodes=$((CHECKED[0] / TASKS_PER_NODE))
    ((nodes == NUM_NODES)) || say "using $nodes of $NUM_NODES nodes, the most that the plan is legal on"
    open_run_folder
    export RING_TRAIN_RUN_DIR=$RUN_DIR
    set_launcher "$RUN_DIR" # again: a container is to see it
    leave_if_finished
    set_deadline
    set_rendezvous
    say "$JOB in $RUN_DIR: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes nodes x $TASKS_PER_NODE ranks, from step $(saved_step)"
    supervise "$nodes" "ring_train.jobs.$JOB" "$@"
}

export_folder() { # WORD...: an export by all ranks of the allocation
    local output
    read_allocation
    catch_signals
    set_launcher
    check job "$JOB:" "$@"
    output=${CHECKED[1]}
    mkdir -p "$(dirname "$output")" || fail "output=$output cannot be written; choose another folder"
    set_launcher "$(dirname "$output")"
    set_rendezvous
    say "export to $output: job $SLURM_JOB_ID, $NUM_NODES nodes x $TASKS_PER_NODE ranks"
    run_through "$NUM_NODES" ring_train.jobs.export "$@"
}

build_index() { # WORD...: what a pretraining maps, built ahead of it without accelerators
    read_allocation
    catch_signals
    set_launcher
    set_rendezvous
    run_through 1 ring_train.jobs.build_index "$@"
}

tokenize() { # WORD...: one file of the input, as a shard of its name
    local input output word words=()
    read_allocation
    catch_signals
    set_launcher
    check shard "$JOB:" "--task=${SLURM_ARRAY_TASK_ID:-}" "$@"
    input=${CHECKED[0]} output=${CHECKED[1]}
    mkdir -p "${output%/*}" || fail "output=${output%/*} cannot be written; choose another folder"
    set_launcher "${output%/*}"
    set_rendezvous
    for word in "$@"; do
        [[ $word == input=* || $word == output=* ]] || words+=("$word")
    done
    [[ " $* " == *" workers="* ]] || words+=("workers=${SLURM_CPUS_PER_TASK:-1}")
    say "tokenizing $input to $output"
    run_through 1 data_pipeline.tokenize "input=$input" "output=$output" "${words[@]}"
}
