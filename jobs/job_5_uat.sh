#!/usr/bin/env bash
#SBATCH --job-name=job_5_uat
#SBATCH --gres=gpu:a100:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=80G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/job_5_uat_%j.out
# By hand: sbatch this file from the checkout; it goes on with the run that was submitted last.
code=${1:-$(cat logs/newest_submission)} || { echo "no run was submitted from $PWD: type 'bash run_all.sh' there first" >&2; exit 2; }
. "$code/jobs/common.sh"
