#!/usr/bin/env bash
# All that is to be measured of the record on one machine, in ten minutes on 8 x H100: step times on all GPUs and on fewer, with
# both forms of the optimiser's state and at two batches; the PyTorch program beside them; a profile with evaluation; a run that
# is stopped by SIGTERM and goes on, on all GPUs and on half of them. Each part has a time limit, and a log of its own in OUT.
#
#   scripts/measure_machine.sh SHARDS VAL_SHARDS OUT [TORCH_REPO]     # globs, quoted; e.g. 'data/fineweb10B/fineweb_train_*.bin'
#
# TORCH_REPO is a checkout of https://github.com/lapp0/sample-efficient-nanogpt; without it PyTorch is left out. PRESETS and
# CACHE (of compiled programs) may be given in the environment.
set -uo pipefail
cd "$(dirname "$0")/.."
shards=${1:?a glob of training shards} val=${2:?a glob of validation shards} out=${3:?a folder} torch=${4:-}
presets=${PRESETS:-recurrent}
if ! names=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null) || [[ -z $names ]]; then
  echo "error: no NVIDIA GPU here (nvidia-smi does not answer); run this on a machine with one" >&2
  exit 2
fi
for pattern in "$shards" "$val"; do
  if ! compgen -G "$pattern" > /dev/null; then
    echo "error: no shard matches '$pattern'; give a glob in quotes" >&2
    exit 2
  fi
done
gpus=$(wc -l <<< "$names")
half=$(( gpus > 1 ? gpus / 2 : 1 ))
fewer=$(for n in 1 2 4; do (( n < gpus )) && echo "$n"; done)
mkdir -p "$out"
data=(--data.train-files "$shards" --data.val-files "$val")
cache=(--compilation-cache "${CACHE:-$out/cache}")

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout --signal=INT --kill-after=20 "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  (( status )) && failed+=("$name")
  echo "$name: status $status, $(( SECONDS - start )) s, $SECONDS s in all"
}
failed=()

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpus.txt"
# shellcheck disable=SC2086
part steps 200 python scripts/bench_gpus.py $presets --gpus "$gpus" --windows 1 7 14 --steps 20 --train-files "$shards" \
  "${cache[@]}" --json "$out/steps.json"
# shellcheck disable=SC2086
part fewer 180 python scripts/bench_gpus.py $presets --gpus ${fewer:-1} --batch-tokens 393216 --windows 14 --steps 12 \
  --forms replicated --train-files "$shards" "${cache[@]}" --json "$out/fewer.json"
if [[ -n $torch ]]; then
  part torch 200 python scripts/bench_vs_torch.py --torch-repo "$torch" --train-files "$shards" --gpus "$gpus" --windows 1 14 \
    --steps 20 --variants ours best --json "$out/torch.json" -- "${cache[@]}"
fi
part profile 120 python -m senano_jax.profile "${presets%% *}" "${data[@]}" "${cache[@]}" --profile-steps 12 --json "$out/profile.json"

# Stopped after its first checkpoint, then on: all GPUs, and half of them.
run=("${data[@]}" "${cache[@]}" --run-dir "$out/run" --steps 60 --val-every 0 --checkpoint-every 20)
timeout --kill-after=20 150 python -m senano_jax.train "${presets%% *}" "${run[@]}" > "$out/stopped.log" 2>&1 &
training=$!
for _ in $(seq 120); do
  grep -q '^step:25/' "$out/stopped.log" && break
  sleep 1
done
kill -TERM $training  # timeout passes it on
wait $training
echo "stopped: status $?, $SECONDS s in all"
cp -r "$out/run" "$out/run-on-half"
part resumed 120 python -m senano_jax.train --run-dir "$out/run" --resume
part resumed-on-half 120 python -m senano_jax.train --run-dir "$out/run-on-half" --resume --devices "$half"
tail -n 1 "$out"/resumed*.log
rm -rf "$out"/run*/checkpoints
if (( ${#failed[@]} )); then
  echo "error: failed: ${failed[*]}; see their logs in $out" >&2
  exit 1
fi
