#!/usr/bin/env bash
# Trains a preset under Slurm, one process a GPU. Two minutes before the time limit Slurm sends SIGTERM, the run saves and
# ends, and this script puts the job back into the queue, from where it goes on. A preempted job does the same within the
# partition's GraceTime, if Slurm requeues it.
#
#   sbatch --nodes=1 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh recurrent [flags of senano_jax.train]
#
#SBATCH --job-name=senano_jax
#SBATCH --time=02:00:00
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail

run_dir=logs/slurm-${SLURM_JOB_ID:?start this with sbatch}  # a requeued job keeps its number
preset=${1:?name a preset}
if [[ -e $run_dir/config.json ]]; then
  arguments=(--resume)
else
  arguments=("$preset" --checkpoint-every 100 "${@:2}")
fi
# The processes find one another through Slurm's environment; --kill-on-bad-exit ends all when one fails.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  python -m senano_jax.train "${arguments[@]}" --run-dir "$run_dir"

# Status 0 also means stopped by the signal. The final evaluation, step:N/N, is what only a complete run has.
if ! grep -qE '^step:([0-9]+)/\1 val_loss' "$run_dir/log.txt"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
