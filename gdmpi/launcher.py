"""What mpirun and srun tell their tasks in the environment, known before MPI starts."""

import os

SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")  # beside Slurm's
RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def rank():
    """This task's rank; 0 without a launcher."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def size():
    """How many tasks there are; 1 without a launcher."""
    told = max((int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit()), default=1)
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "").isdigit():
        told = max(told, int(os.environ["SLURM_STEP_NUM_TASKS"]))
    return told


def speaks_pmi():
    """Whether ranks find each other by Slurm's PMI-1 or PMI-2, as those of MPICH do."""
    return "PMI_FD" in os.environ and "SLURM_STEP_ID" in os.environ
