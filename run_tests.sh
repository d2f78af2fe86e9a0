#!/usr/bin/env bash
# bash run_tests.sh [quick|unit|integration|slurm|coverage|all] [pytest options]    (default: all)
set -euo pipefail
cd "$(dirname "$0")"
. jobs/environment.sh

kind=${1:-all}
[ $# -gt 0 ] && shift
case $kind in
    quick | unit) options=(-m "not integration and not slurm") ;;
    integration) options=(-m "integration and not slurm") ;;
    slurm) options=(-m slurm) ;;
    coverage) options=(--cov --cov-report=term) ;;
    all) options=() ;;
    *)
        echo "unknown kind of test '$kind'; expected quick, unit, integration, slurm, coverage or all" >&2
        exit 2
        ;;
esac
choose_python
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# Else every worker, and every process that a test starts, would compile the same files again.
unset PYTHONDONTWRITEBYTECODE
# A worker costs the time of its imports. Tests on a cluster mostly wait, the others do not.
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
workers=$((cores + $(command -v sbatch >/dev/null && echo 2 || echo 1)))
"$PYTHON" -m pytest -rs -n "$((workers < 8 ? workers : 8))" --dist worksteal "${options[@]+"${options[@]}"}" "$@"
if [ "$kind" = coverage ]; then
    "$PYTHON" -m coverage json -q -o .coverage.json
    "$PYTHON" -m tests.coverage_floor .coverage.json
fi
