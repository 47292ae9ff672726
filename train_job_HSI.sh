#!/usr/bin/env bash
#SBATCH --job-name=hsifusion
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Train HSIFusionNet on Slurm, on one node or many. Submit from the checkout; options of sbatch stand before the script
# and win over the lines above, options of the trainer stand after it:
#     sbatch --nodes=2 --time=72:00:00 train_job_HSI.sh --model_size small --experiment_name small_a
#
# Before the time limit and when the job is preempted, the trainers save and the job is queued again, as often as
# the run needs. `scancel` saves too and ends the job. The same sbatch line always goes on with the run, where it
# is; another run needs another --experiment_name. All starts of a job append to one log.

set -euo pipefail
: "${SLURM_JOB_ID:?submit this with sbatch}"

# The site: change these here, or set them where you call sbatch.
: "${PYTHON:=.venv/bin/python}"                            # the one that `make` sets up
: "${SITE_SETUP:=}"                                        # a file to source first: `module load` and the like
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"            # trainers on each node, one for a GPU
: "${RENDEZVOUS_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"  # free on the first node; jobs that share it differ
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"             # of each trainer
export HSI_DATA_DIR="${HSI_DATA_DIR:-./data/ARAD_1K}"
export HSI_LOG_DIR="${HSI_LOG_DIR:-./artifacts/logs}"
export HSI_CKPT_DIR="${HSI_CKPT_DIR:-./artifacts/checkpoints}"
if [[ -z ${PYTORCH_ALLOC_CONF:-} ]]; then
  export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
fi

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

queue_again() {
  say "stopped before its end, queued again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

# The signal of the lines above comes to this script alone (B:). srun gives it to the launcher on every node, and
# each launcher to its trainers.
stop() {
  trap '' USR1
  say "asked to stop"
  if [[ -n $launcher ]]; then
    kill -USR1 "$launcher" || true
    wait "$launcher" && exit 0
  fi
  queue_again
}
launcher=""
trap stop USR1

if [[ -n $SITE_SETUP ]]; then
  # shellcheck source=/dev/null
  source "$SITE_SETUP"
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
mapfile -t nodes <<<"$hosts"
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on ${nodes[*]}"

# A launcher kills trainers that have not saved 110 s after the signal; --wait gives other nodes as long when one has
# ended. In the background, because bash acts on a signal only between commands and in `wait`.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=110 "$PYTHON" -m torch.distributed.run \
  --nnodes="${#nodes[@]}" --nproc_per_node="$RANKS_PER_NODE" \
  --rdzv_backend=c10d --rdzv_endpoint="${nodes[0]}:$RENDEZVOUS_PORT" --rdzv_id="$SLURM_JOB_ID" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=110 \
  hsifusion_training.py --resume_from auto "$@" &
launcher=$!
wait "$launcher" || {
  code=$?
  # A preemption with grace time signals the trainers alone. (Without one, Slurm itself queues the job again.)
  if [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]; then queue_again; fi
  exit "$code"
}
