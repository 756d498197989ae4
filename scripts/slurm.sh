#!/usr/bin/env bash
# Trains a preset under Slurm, one process a GPU, and survives preemption: Slurm sends SIGTERM two minutes before it takes
# the nodes away, the run saves and ends, and the requeued job goes on from there.
#
#   sbatch --nodes=1 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh recurrent [flags of senano_jax.train]
#
#SBATCH --job-name=senano_jax
#SBATCH --time=02:00:00
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-%j.txt
set -euo pipefail

run_dir=logs/slurm-${SLURM_JOB_ID:?start this with sbatch}  # a requeued job keeps its number
if [[ -e $run_dir/config.json ]]; then
  arguments=(--resume)
else
  arguments=("$@" --checkpoint-every 100)
fi
# The processes find one another through Slurm's environment; --kill-on-bad-exit ends all when one fails.
exec srun --kill-on-bad-exit=1 python -m senano_jax.train "${arguments[@]}" --run-dir "$run_dir"
