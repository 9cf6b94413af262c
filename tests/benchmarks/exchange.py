"""gdmpi bench with six ranks, under MPICH and, where GDMPI_OPENMPI names its environment, Open MPI."""

import argparse
import os
import re

import common


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=6)
    parser.add_argument("--parameters", type=int, default=2_101_248)
    args = parser.parse_args()
    libraries = ["mpich"] + ["openmpi"] * ("GDMPI_OPENMPI" in os.environ)
    print(common.head("a round of", "rounds", "median ms", "10-90 %", "to bare", "MPI"))
    notes = []
    for mpi in libraries:
        words = ["bench", "--rounds", args.rounds, "--parameters", args.parameters]
        lines = common.finish(common.start(["-m", "gdmpi"], words, args.ranks, mpi)).splitlines()
        found = [re.fullmatch(r"(.{32})\s*(\d+)\s+([\d.]+)\s+([\d.]+-[\d.]+)\s+(\S+)", line) for line in lines]
        for cells in filter(None, found):
            print(common.row(*map(str.strip, cells.groups()), mpi), flush=True)
        notes += [f"{mpi}: {line}" for line, cells in zip(lines, found, strict=True) if not cells]
    print()
    print("\n".join(f"- {note}" for note in notes if "median ms" not in note))


if __name__ == "__main__":
    main()
