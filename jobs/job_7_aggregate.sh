#!/usr/bin/env bash
#SBATCH --job-name=job_7_aggregate
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/job_7_aggregate_%j.out
# By hand: sbatch this file from the checkout; it goes on with the run that was submitted last.
code=${1:-$(cat logs/newest_submission)} || { echo "no run was submitted from $PWD: type 'bash run_all.sh' there first" >&2; exit 2; }
. "$code/jobs/common.sh"
