#!/usr/bin/env bash
# `sbatch cluster/slurm.sh python jobs/pipeline.py sarm-1b --out /shared/sarm-1b ...`: a Ray cluster over the allocation, for one
# command, ended with it. Run it from the checkout, on a file system that all nodes see. See cluster/README.md.
#SBATCH --job-name=sarm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --output=sarm-%j.log
# Two minutes before the end: training saves its state, leaves with status 75, and the job queues itself again.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "error: no command. Try: sbatch cluster/slurm.sh python jobs/pipeline.py tiny --out /shared/tiny" >&2
  exit 2
fi

umask 077
# Two jobs on one node need two ports, and nobody else may submit to this cluster: a token of its own, in a file, never in an argument.
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
export RAY_TMPDIR="${SLURM_TMPDIR:-/tmp}/ray-$SLURM_JOB_ID"
export PYTHONPATH="$PWD/platform${PYTHONPATH:+:$PYTHONPATH}"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" -- "$@" &
running=$!
trap 'kill -TERM "$running"' TERM
status=0
# A signal ends the first wait, not the command: what counts is how that ends.
wait "$running" || status=$?
if kill -0 "$running" 2>/dev/null; then wait "$running" && status=0 || status=$?; fi
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
