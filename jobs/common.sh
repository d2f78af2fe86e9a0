# shellcheck shell=bash
# Sourced by every job script: the environment, the GPU log, Python as a child that is asked to stop in time, and what its
# exit code means. `code` is the run's frozen copy of the program; the second argument, how often the job's predecessors restarted, is
# missing if the job was submitted by hand.
#
# Exit code 75 of a stage: stopped in time, the state is saved. The job then goes back into the queue under its own id, so that
# the jobs that wait for it keep waiting. Any other code but 0 ends the chain.

umask o-w
asked='' interrupted=0 child='' sampler=''

say() { echo "[$(date '+%F %T')] $*"; }

# A trap must be there before anything else: SIGUSR1 ends a shell that has none.
# shellcheck disable=SC2317 # the traps call it
ask_to_stop() {
    asked=$1 interrupted=1
    say "signal $1: asking the stage to save and stop"
    [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || true
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

program() { # the frozen code, whatever folder this is
    exec "$PYTHON" -c 'import sys; sys.path[0] = sys.argv.pop(1); from stages.__main__ import main; sys.exit(main())' "$code" "$@"
}

gpu_log() {
    if ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null 2>&1; then
        say "no NVIDIA GPU visible here"
        return
    fi
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader | sed 's/^/    GPU (name, driver, memory, used at start): /'
    local log="logs/gpu_${SLURM_JOB_NAME}_${SLURM_JOB_ID}.csv"
    nvidia-smi --query-gpu=timestamp,index,utilization.gpu,memory.used,power.draw,temperature.gpu --format=csv,nounits \
        --loop="${GPU_LOG_SECONDS:-30}" >>"$log" 2>/dev/null &
    sampler=$!
    say "GPU samples: $log"
}

# wait returns early when a trap ran; the child's own code is what counts.
wait_for_child() {
    local last
    while :; do
        interrupted=0
        wait "$child"
        status=$?
        [ "$interrupted" = 1 ] || return 0
        if ! kill -0 "$child" 2>/dev/null; then
            wait "$child" 2>/dev/null
            last=$?
            [ "$last" = 127 ] || status=$last
            return 0
        fi
    done
}

run_as_child() {
    program "$@" &
    child=$!
    [ -z "$asked" ] || kill -USR1 "$child" 2>/dev/null || true
    wait_for_child
    child=''
}

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stage=${SLURM_JOB_NAME#*_}
stage=${stage%%_*}
if ! [[ ${SLURM_JOB_NAME:-} =~ ^(job_[0-7]|share_[56])_[[:alnum:]_]+$ ]]; then
    say "found the job name '${SLURM_JOB_NAME:-}', expected that of the script (job_2_baseline): submit without --job-name and SBATCH_JOB_NAME" >&2
    exit 2
fi
work=job
case $SLURM_JOB_NAME in share_*) work=share ;; esac
[ -f "$code/site.sh" ] || { say "$code holds no site.sh: submit the run with 'bash run_all.sh' first" >&2; exit 2; }
root='' network='' PYTHON=''
# shellcheck source=/dev/null
. "$code/site.sh"
cd "$root" || exit 2
mkdir -p logs
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false JOB_RESTARTS="${2:-}"
if [ "$network" = none ] || { [ "$network" = setup ] && [ "$stage" != 0 ]; }; then
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
fi
# Slurm before 23.02 does not tell a job when it ends. The number of an array's last task is that of the whole array.
own=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
if [ -z "${SLURM_JOB_END_TIME:-}" ] && ends=$(timeout 20 squeue -h -j "${own:-$SLURM_JOB_ID}" -o %e 2>/dev/null); then
    SLURM_JOB_END_TIME=$(date -d "$ends" +%s 2>/dev/null || true)
    export SLURM_JOB_END_TIME
fi
say "$SLURM_JOB_NAME, job $SLURM_JOB_ID${SLURM_ARRAY_TASK_ID:+ (task $SLURM_ARRAY_TASK_ID of array $SLURM_ARRAY_JOB_ID)} on $(hostname)," \
    "restarts ${SLURM_RESTART_COUNT:-0}, ends at ${ends:-${SLURM_JOB_END_TIME:-an unknown time}}"
gpu_log

status=75
[ -n "$asked" ] || run_as_child "$work" "$stage"
[ -z "$sampler" ] || kill "$sampler" 2>/dev/null || true

# The signal can hit Python before it listens, and bash can lose the code of a child that ends while a trap runs (-1).
# Nothing is lost then: all that is on the disk is whole.
case $asked:$status in ?*:138 | ?*:143 | ?*:-1) status=75 ;; esac
if [ "$work" = share ]; then
    [ "$status" = 0 ] || say "this task ended with code $status; what it left undone, the stage's own job does"
elif [ "$status" = 75 ]; then
    trap '' USR1 TERM # the way back into the queue is not to be cut short, by the time limit say
    asked=''
    run_as_child requeue "$stage"
elif [ "$status" != 0 ]; then
    [ "$status" != 137 ] || say "the stage was killed: the node's memory did not suffice (memory in the cluster file), or someone did it" >&2
    say "the stage ended with code $status. Jobs that wait for it are cancelled by SLURM. Read the lines above; when the cause is gone: bash run_all.sh --resume" >&2
fi
say "ends with code $status"
exit "$status"
