#!/usr/bin/env bash
# The whole pipeline. `bash run_all.sh --help` lists the options.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
. jobs/environment.sh

usage() {
    cat <<'TEXT'
bash run_all.sh [options]        run stages 0 to 7; what is complete is passed over, what was interrupted goes on
  --config NAME|FILE     preset in configs/ or a YAML file (default: mini, the embedded default)
  --seeds N,N,...        training seeds
  --from N --to N        first and last stage
  --run-name NAME        name of the run's folders
  --set KEY=VALUE        override one key of the configuration; repeatable
  --discard              move aside what another configuration made, and start that afresh
  --local                run on this machine even where sbatch is on the PATH
  --plan                 print the stages and what each waits for
  --status               print how far the run is
TEXT
}

# Paths are those of the folder that the caller stands in.
for name in SCRATCH PROJECT; do
    case ${!name:-/} in /*) ;; *) export "$name=$caller/${!name}" ;; esac
done

command=run local_run=0 arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --local) local_run=1 ;;
        --plan) command=plan ;;
        --status) command=status ;;
        --config)
            arguments+=(--config)
            [ $# -gt 1 ] && shift && if [ -f "$caller/$1" ]; then arguments+=("$caller/$1"); else arguments+=("$1"); fi
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

if [ "$command" = run ] && [ "$local_run" = 0 ]; then
    if command -v sbatch >/dev/null; then
        echo "sbatch is on the PATH, but this version does not submit jobs yet; run on this machine with --local" >&2
        exit 2
    fi
    echo "no sbatch on the PATH: running stage after stage on this machine"
fi
choose_python
exec "$PYTHON" -m stages "$command" "${arguments[@]+"${arguments[@]}"}"
