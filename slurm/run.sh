#!/usr/bin/env bash
# gdmpi as a Slurm batch job, which goes on by itself after a time limit, a preemption or a lost node:
#
#   sbatch slurm/run.sh CONFIG.yaml [section.key=value ...]
#
# The server is rank 0 and needs no GPU; each client wants one. sbatch's options, before the script, say how many:
#
#   one node       sbatch --nodes=1 --ntasks=6 --gpus-per-node=5 slurm/run.sh ...     client ranks take them in turn
#   several nodes  sbatch --ntasks=1 : --ntasks=8 --gpus-per-task=1 slurm/run.sh ...  a heterogeneous job: the server
#                  on a node without GPUs, eight clients with a GPU each; options of either part stand on its side of
#                  the colon, as in: --partition=cpu --ntasks=1 : --partition=gpu --ntasks=8 --gpus-per-task=1
#   no GPUs        sbatch --nodes=2 --ntasks=6 slurm/run.sh ... run.device=cpu
#
# Options on sbatch's command line win over the lines below.

# The job's name in squeue, and in the log's.
#SBATCH --job-name=gdmpi
# MPI ranks: the server and one for each client; fewer ranks host several clients each, to the same bits.
#SBATCH --ntasks=6
# Cores of a rank; more are of use with train.threads.
#SBATCH --cpus-per-task=1
# The limit. The run stops by itself after the last round that fits, and the job goes back into the queue.
#SBATCH --time=04:00:00
# The log, by the number of the job; a job that starts again goes on in the same log.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Slurm itself starts the job again after the loss of a node or a preemption.
#SBATCH --requeue
# Should a round take longer than was foreseen: the ranks get USR1 (run.signal) so many seconds before the limit, and
# save. Slurm may be a minute early, so this is for limits of well over 3 minutes.
#SBATCH --signal=USR1@120
# GPUs: a cluster without any refuses a job that asks for them, so ask on the command line, or without the first #:
##SBATCH --gpus-per-node=5

set -uo pipefail

# ---- your site: the only lines to adapt -----------------------------------------------------------------------------
# module load openmpi cuda
# source ~/venvs/gdmpi/bin/activate
python=(python)
# python=(apptainer exec --nv gdmpi.sif python)  # the same in a container
# ---------------------------------------------------------------------------------------------------------------------

say() { echo "slurm/run.sh: $*" >&2; }

# slurm/sweep.sh: a task of its job array takes its line of a file, words parted by tabs; a word "show" prints runs.
if [[ ${1:-} == @* ]]; then
  IFS=$'\t' read -r -a words < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "${1#@}")
  set -- "${words[@]}"
fi
if [[ ${1:-} == show ]]; then
  exec "${python[@]}" -m gdmpi "$@"
fi
if [[ ! -f ${1:-} || -z ${SLURM_JOB_ID:-} ]]; then
  say "give a configuration that exists, and start it with sbatch: sbatch slurm/run.sh CONFIG.yaml [section.key=value ...]"
  exit 2
fi

# A task of an array has a number of its own, by which the others are left alone.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}

# Compute nodes often have no network: what `check --download` left in run.cache is found without one.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} TOKENIZERS_PARALLELISM=false
# srun asks anew for the cores of a task.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# Older versions of Slurm do not tell a job when it will end.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
  end=$(squeue -h -j "$job" -o %e | head -n 1)
  [[ $end != *T*:* ]] || SLURM_JOB_END_TIME=$(date -d "$end" +%s)
  export SLURM_JOB_END_TIME
fi

# How ranks find each other: Open MPI speaks PMIx, the MPICH wheel and most other MPICHs PMI-2. SLURM_MPI_TYPE, set
# beforehand, wins, for an MPI that wants something else (one of `srun --mpi=list`).
if [[ -z ${SLURM_MPI_TYPE:-} ]]; then
  library=$("${python[@]}" -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.Get_library_version())')
  case $library in
    *"Open MPI"*) type=pmix ;;
    *CRAY*) type=cray_shasta ;;
    *) type=pmi2 ;;
  esac
  if grep -qw "$type" <<<"$(srun --mpi=list 2>&1)"; then # no pipe: srun must not die of a grep that has seen enough
    export SLURM_MPI_TYPE=$type
  fi
fi

# The ranks, of all parts of a heterogeneous job. One that fails takes the others along, rather than let them wait.
ranks=("${python[@]}" -m gdmpi run --continue "$@") nothing=(true)
if [[ -n ${SLURM_HET_SIZE:-} ]]; then
  parts=() nothing=()
  for ((part = 0; part < SLURM_HET_SIZE; part++)); do
    cores=SLURM_CPUS_PER_TASK_HET_GROUP_$part
    parts+=(: "--het-group=$part" ${!cores:+"--cpus-per-task=${!cores}"} "${ranks[@]}")
    nothing+=(: "--het-group=$part" true)
  done
  ranks=("${parts[@]:1}") nothing=("${nothing[@]:1}")
fi
# MPICH names a node's shared memory by job and step, and takes what a killed start of that name has left there for its
# own: it aborts or hangs. As a job that starts again counts its steps from 0 again, steps that do nothing come first.
for ((restart = 0; restart < ${SLURM_RESTART_COUNT:-0}; restart++)); do
  srun "${nothing[@]}"
done
# In the background, as bash hears no signal while it waits for a command. Slurm signals the ranks themselves; what only
# this shell is told (scancel --batch) is passed on as USR1, since a TERM would have srun kill them.
srun --kill-on-bad-exit=1 "${ranks[@]}" &
step=$! ending=
trap 'kill -USR1 "$step" 2>/dev/null' USR1
trap 'ending=yes; kill -USR1 "$step" 2>/dev/null' TERM
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
done
wait "$step"
code=$?
[[ $code == 75 ]] || exit "$code"

# ---- stopped early, everything is saved: start again ----------------------------------------------------------------
# A job that is no longer running was cancelled, or Slurm starts it again itself; after the time limit it does not.
read -r state reason limit < <(squeue -h -j "$job" -o "%T %r %l")
: "${state:=${ending:-RUNNING}}"
if [[ $state != RUNNING && ${reason:-} != TimeLimit ]]; then
  say "job $job stops here, which was Slurm's or your decision; the run can go on from its last round"
  exit 75
fi
if scontrol requeue "$job"; then
  say "job $job is in the queue again and will go on from the last round"
  exit 75
fi

# Not allowed here, or no scontrol: a new job like this one.
like() { # sbatch's options, from what Slurm told this job (part $1 of a heterogeneous one)
  local pair name
  for pair in nodes=JOB_NUM_NODES ntasks=NTASKS cpus-per-task=CPUS_PER_TASK partition=JOB_PARTITION \
    account=JOB_ACCOUNT qos=JOB_QOS mem=MEM_PER_NODE mem-per-cpu=MEM_PER_CPU gpus=GPUS \
    gpus-per-node=GPUS_PER_NODE gpus-per-task=GPUS_PER_TASK; do
    name=SLURM_${pair#*=}${1:+_HET_GROUP_$1}
    [[ -z ${!name:-} ]] || echo "--${pair%%=*}=${!name}"
  done
}
mapfile -t options < <(like "${SLURM_HET_SIZE:+0}")
options+=("--job-name=$SLURM_JOB_NAME" "--dependency=afterany:$job" ${limit:+"--time=$limit"})
for ((part = 1; part < ${SLURM_HET_SIZE:-0}; part++)); do
  mapfile -t -O "${#options[@]}" options < <(echo : && like "$part")
done
for name in "${!SLURM_@}" "${!SRUN_@}"; do # what this job was told must not pass for what the next is told
  [[ $name == SLURM_CONF || $name == SLURM_MPI_TYPE ]] || unset "$name"
done
if next=$(sbatch --parsable "${options[@]}" "$0" "$@"); then
  say "job $job could not be requeued and goes on as job $next"
else
  say "job $job could be neither requeued nor submitted again: submit it yourself, it goes on from the last round"
fi
exit 75
