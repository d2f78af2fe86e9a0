#!/usr/bin/env bash
# The whole pipeline. `bash run_all.sh --help` lists the options.
set -euo pipefail
umask o-w
caller=$PWD
cd "$(dirname "$0")"
. jobs/environment.sh

usage() {
    cat <<'TEXT'
bash run_all.sh [options]        run stages 0 to 7; what is complete is passed over, what was interrupted goes on
  With sbatch on the PATH the stages are submitted to SLURM as a chain of jobs; without it they run here, one after the other.
  --config NAME|FILE     preset in configs/ or a YAML file (default: pythia-1.4b on a cluster, else mini, the embedded default)
  --seeds N,N,...        training seeds; on a cluster one array job a stage
  --from N --to N        first and last stage
  --run-name NAME        name of the run's folders
  --set KEY=VALUE        override one key of the configuration; repeatable
  --discard              move aside what another configuration made, and start that afresh
  --local                run on this machine even where sbatch is on the PATH
  --plan                 print the stages and what each waits for
  --status               print how far the run is and what to type next; of the run submitted last, if there is one
  --watch [SECONDS]      the same, again and again
On a cluster:
  --cluster NAME|FILE    the site: a file in configs/clusters/ or a YAML file (default: generic; SBATCH_* variables are honoured)
  --dry-run              print every sbatch line, submit nothing
  --resume               submit what is missing of the run submitted last (or of --run-name), as it was configured
  --yes                  do not ask
TEXT
}

# Paths are those of the folder that the caller stands in.
for name in SCRATCH PROJECT; do
    case ${!name:-/} in /*) ;; *) export "$name=$caller/${!name}" ;; esac
done

command=run local_run=0 cluster_only='' arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --local) local_run=1 ;;
        --plan) command=plan ;;
        --status) command=status ;;
        --watch) command=status; arguments+=(--watch) ;;
        --config | --cluster)
            arguments+=("$1")
            [ "$1" = --config ] || cluster_only=$1
            [ $# -gt 1 ] && shift && if [ -f "$caller/$1" ]; then arguments+=("$caller/$1"); else arguments+=("$1"); fi
            ;;
        --dry-run | --resume | --yes) arguments+=("$1"); cluster_only=$1 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

if [ "$command" = run ] && [ "$local_run" = 0 ]; then
    if command -v sbatch >/dev/null; then
        command=submit
    elif [ -n "$cluster_only" ]; then
        echo "found no sbatch on the PATH, and $cluster_only is for SLURM; on this machine 'bash run_all.sh' with the same options goes on by itself" >&2
        exit 2
    else
        echo "no sbatch on the PATH: running stage after stage on this machine"
    fi
fi
if [ "$command" = run ] && [ -n "$cluster_only" ]; then
    echo "$cluster_only is for SLURM; leave it out with --local" >&2
    exit 2
fi
choose_python
exec "$PYTHON" -m stages "$command" "${arguments[@]+"${arguments[@]}"}"
