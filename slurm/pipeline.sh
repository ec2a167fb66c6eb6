#!/usr/bin/env bash
# Submit stages that follow one another, each released only when all before it are done:
#
#   slurm/pipeline.sh data: input='raw/*.jsonl' tokenizer=DIR output=data/web \\
#       build_index: \\
#       pretrain: --nodes=4 experiment=NAME run_dir=runs/base ... \\
#       sft: --nodes=2 experiment=NAME run_dir=runs/chat ... \\
#       export: output=exports/chat
#
# Any stage may be left out; data: may come several times. Words that begin with `-` are options of
# sbatch, in one word each. sft: starts from the training before unless init_from= is given, export:
# takes the training before unless checkpoint= is given, build_index: has the words of pretrain:.
# Nothing is submitted if one stage is wrong. Stages that are finished are left out: the same command
# goes on where a chain ended.
set -euo pipefail

JOB=pretrain
if [[ ! -f slurm/common.sh || ! -f ring_train/jobs/pretrain.py ]]; then
    echo "error: $PWD is not the repository of ring_train (no slurm/common.sh there); run slurm/pipeline.sh from its top folder" >&2
    exit 2
fi
. slurm/common.sh

words_of() { # NUMBER WORD...: sets OPTIONS and WORDS of a stage, counted from 0
    local number=$1 stage=-1 word
    shift
    OPTIONS=() WORDS=()
    for word in "$@"; do
        case $word in
        data: | build_index: | pretrain: | sft: | export:) stage=$((stage + 1)) ;;
        -*) ((stage != number)) || OPTIONS+=("$word") ;;
        *) ((stage != number)) || WORDS+=("$word") ;;
        esac
    done
}

read_stage() { # NUMBER WORD...: sets NAME STATE FOLDER, OPTIONS and WORDS
    local added
    IFS=$'\t' read -r NAME STATE FOLDER added <<<"${checked[$1]}"
    words_of "$@"
    if [[ $NAME == build_index ]]; then
        local options=("${OPTIONS[@]}")
        words_of "$(($1 + 1))" "${@:2}" # of pretrain
        OPTIONS=("${options[@]}")
    fi
    if [[ $NAME == data ]]; then
        OPTIONS=("--array=$FOLDER" "${OPTIONS[@]}")
    fi
    [[ -z $added ]] || WORDS+=("$added")
}

submit() { # [OPTION...]: hands the stage that was read to sbatch
    sbatch "${OPTIONS[@]}" "$@" "slurm/$NAME.sh" "${WORDS[@]}"
}

find_python
command -v sbatch >/dev/null || fail "sbatch is not on the PATH of $(hostname); run this on a login node of the cluster"
lines=$("$RING_TRAIN_PYTHON" slurm/check.py chain "$@") || exit $USER_ERROR
mapfile -t checked <<<"$lines"

for number in "${!checked[@]}"; do
    read_stage "$number" "$@"
    [[ $STATE == finished ]] || problem=$(submit --test-only 2>&1) ||
        fail "$NAME: sbatch refuses it, and nothing was submitted: ${problem//$'\n'/; }"
done

printf '%-12s %-10s %-16s %s\n' stage job "waits for" "folder or array"
before=() # jobs that the next stage waits for
data=()
submitted=()
for number in "${!checked[@]}"; do
    read_stage "$number" "$@"
    if [[ $NAME != data ]]; then
        ((${#data[@]} == 0)) || before=("${data[@]}")
        data=()
    fi
    if [[ $STATE == finished ]]; then
        printf '%-12s %-10s %-16s %s\n' "$NAME" finished - "$FOLDER"
        continue
    fi
    after=()
    [[ $NAME == data || ${#before[@]} == 0 ]] || after=("--dependency=afterok:$(IFS=:; echo "${before[*]}")")
    if ! id=$(submit --parsable --kill-on-invalid-dep=yes "${after[@]}"); then
        ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
        fail "$NAME was refused by sbatch; the jobs submitted before it (${submitted[*]:-none}) were cancelled"
    fi
    id=${id%%;*} # of a federation: id;cluster
    submitted+=("$id")
    printf '%-12s %-10s %-16s %s\n' "$NAME" "$id" "$(IFS=,; echo "${before[*]:--}")" "$FOLDER"
    if [[ $NAME == data ]]; then data+=("$id"); else before=("$id"); fi
done
