#!/usr/bin/env bash
# Many runs as one job array of slurm/run.sh, and at the end a job that prints them beside each other:
#
#   slurm/sweep.sh [--sbatch-option=...] CONFIG.yaml section.key=value,value... [section.key=value ...]
#   slurm/sweep.sh --ntasks=6 --gpus-per-node=5 configs/llama2-7b-mental-health.yaml run.seed=0,1,2 train.lr=1e-4,2e-4
#
# A run for each combination of the listed values, in a directory of its own: run.name, and what is particular to it,
# as in llama2-7b-mental-health-seed0-lr1e-4. A comma within brackets or quotes parts nothing: [q_proj,v_proj]. Beside
# the runs lie NAME-sweep/tasks, what each task of the array was given, and in the end NAME-sweep/comparison.txt.
#
# Start it where python finds gdmpi: all combinations must be valid configurations, or nothing is submitted. sbatch's
# options hold for each run; they must be of the form --option=value. Slurm knows no arrays of heterogeneous jobs.
set -euo pipefail

options=() place=()
while [[ ${1:-} == --* ]]; do
  options+=("$1")
  shift
done
run="$(dirname "${BASH_SOURCE[0]}")/run.sh"

# Writes the tasks' file and prints: their number, the sweep's directory, and each run's.
plan=$(
  python - "$@" <<'END'
import itertools
import re
import sys
from pathlib import Path

from gdmpi import config
from gdmpi.errors import UserError


def parts(text):
    """A list's values: cut at commas that stand in no brackets and no quotes."""
    depth, quote, values = 0, "", [""]
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += letter
    return values


def plan(path="", *words):
    lists, fixed = [], []
    if not Path(path).is_file():
        raise UserError(f"{path or 'nothing'}: give a configuration that exists, then section.key=value,value")
    for word in words:
        key, equals, text = word.partition("=")
        values = parts(text)
        if not re.fullmatch(r"\w+(\.\w+)+", key) or not equals or "" in values or re.search(r"[\t\n]", word):
            raise UserError(f"{word}: not understood; give section.key=value or section.key=value,value")
        if len(values) > 1 and key in ("run.name", "run.out"):
            raise UserError(f"{word}: every run has its own directory anyway; give one value")
        (lists if len(values) > 1 else fixed).append([f"{key}={value}" for value in values])
    if not lists:
        raise UserError("nothing to sweep: give a list, section.key=value,value")
    fixed = [word for (word,) in fixed]
    base = config.load(path, fixed)
    runs = {}
    for chosen in itertools.product(*lists):
        name = base.run.name
        for word in chosen:
            key, _, value = word.partition("=")
            key = key.rpartition(".")[2].removesuffix("name")  # method.name=fedavg needs no more than fedavg
            name += f"-{key}" + re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip("_")
        if name in runs:
            raise UserError(f"two runs would have the name {name}; give values that differ in letters or digits")
        runs[name] = [path, *fixed, *chosen, f"run.name={name}"]
        config.load(path, runs[name][1:])
    sweep = Path(base.run.out) / f"{base.run.name}-sweep"
    sweep.mkdir(parents=True, exist_ok=True)
    (sweep / "tasks").write_text("".join("\t".join(words) + "\n" for words in runs.values()))
    return [len(runs), sweep, *(Path(base.run.out) / name for name in runs)]


try:
    print(*plan(*sys.argv[1:]), sep="\n")
except UserError as error:
    sys.exit(print(f"slurm/sweep.sh: {error}", file=sys.stderr) or 2)
END
)
mapfile -t lines <<<"$plan"
sweep=${lines[1]} runs=("${lines[@]:2}")

array=$(sbatch --parsable "${options[@]}" --array="0-$((lines[0] - 1))" "$run" "@$sweep/tasks")
# afterany: the comparison is worth having if a run fails, too. A requeued run is waited for.
for option in "${options[@]}"; do
  case $option in --account=* | --partition=* | --qos=* | --reservation=*) place+=("$option") ;; esac
done
last=$(sbatch --parsable "${place[@]}" --job-name=gdmpi-comparison --ntasks=1 --time=10 --dependency="afterany:$array" \
  --open-mode=truncate --output="$sweep/comparison.txt" "$run" show "${runs[@]}")
echo "job $array: ${#runs[@]} runs, as $sweep/tasks lists them"
echo "job $last: their comparison, into $sweep/comparison.txt"
