# What the comparisons in configs/ share: runs that are resumed where they stopped and not done twice, and learning rates
# that each method gets the same number of tries for. To be sourced, by a script that runs in bash's strict mode and has
# set, beside OUT, SEEDS and LAUNCH:
#
#   CONFIG, SETTINGS   what all runs begin with: a file, and section.key=value parted by blanks
#   RATES              the learning rates that are tried
#   BEST               what decides between them: eval_loss, the lowest, if it is not set, or eval_accuracy, the highest
#   ROUNDS             settings of the groups that try none
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# play NAME section.key=value...: one run, unless it is done; what it says goes into NAME/log.txt
play() {
  local name=$1
  shift
  echo "$name: $*"
  # shellcheck disable=SC2086
  $LAUNCH python -m gdmpi run --continue "$CONFIG" run.out="$OUT" run.name="$name" ${SETTINGS:-} "$@" >"$OUT/$name.out" 2>&1 ||
    { tail -n 3 "$OUT/$name.out" >&2 && return 1; }
  rm "$OUT/$name.out"
}

# best NAME: the learning rate of that one of NAME-lr..., all of seed 0, which is done and whose last $BEST is the best
best() {
  local key=${BEST:-eval_loss} order=-g
  [ "$key" = eval_loss ] || order=-gr
  for rate in $RATES; do
    { python -m gdmpi show --json "$OUT/$1-lr$rate-seed0" || echo null; } | python -c "
import json, sys
run = json.load(sys.stdin)
if run and run['rounds_done'] == run['rounds_planned'] and run['rounds'][-1]['$key'] < float('inf'):  # nor nan
    print(run['rounds'][-1]['$key'], '$rate')"
  done | sort $order | head -n 1 | cut -d' ' -f2
}

# tuned NAME section.key=value...: NAME with every learning rate and the first seed, then with the best and all seeds
tuned() {
  local name=$1 rate
  shift
  for rate in $RATES; do  # one that diverges is no choice, and no reason to stop
    play "$name-lr$rate-seed0" train.lr="$rate" "$@" || true
  done
  rate=$(best "$name")
  [ -n "$rate" ] || { echo "${0##*/}: $name: no learning rate came to its end with a number" >&2 && return 1; }
  for seed in $SEEDS; do
    play "$name-lr$rate-seed$seed" train.lr="$rate" run.seed="$seed" "$@"
    chosen+=("$OUT/$name-lr$rate-seed$seed")
  done
}

# seeds NAME section.key=value...: NAME with all seeds and one learning rate for all; base is in several groups
seeds() {
  local name=$1
  shift
  for seed in $SEEDS; do
    # shellcheck disable=SC2086
    play "$name-seed$seed" $ROUNDS run.seed="$seed" "$@"
    chosen+=("$OUT/$name-seed$seed")
  done
}

# tell GROUP: the table and the figure of the chosen runs
tell() {
  python -m gdmpi show --format markdown "${chosen[@]}" | tee "$OUT/$1.md"
  python -m gdmpi plot "${chosen[@]}" -o "$OUT/$1.png"
}
