#!/usr/bin/env bash
# The paper's comparison and the experiments that it proposes next, in groups; each run is resumed where it stopped, and
# what is done is not done again:
#
#   configs/paper/study.sh main          delta, both full updates, centralised, local: 4 learning rates each, then 3 seeds
#   configs/paper/study.sh rank          r = 16, 32, 64, 128
#   configs/paper/study.sh batch         4, 8, 16, 32 rows a step
#   configs/paper/study.sh clients       5, 20 and 50 clients; 20 and 50 of which 5 take part in a round
#   configs/paper/study.sh split         iid, by topic, Dirichlet 0.1 over topics
#   configs/paper/study.sh long          50 rounds over a base in 4 bits and one that is not: do its errors add up?
#
# Tables (show) and figures (plot) of a group are written beside its runs, into $OUT. Start it in an environment with
# gdmpi[plot], from the project's root. This line is the one to change for the paper's own model, on a cluster:
MODEL=${MODEL:-small}
set -euo pipefail

# Where several groups meet: five clients that hold rows dealt at random, r = 64, 4 rows a step. ALPHA is r = 64's; with
# other ranks alpha / r stays. ROUNDS and LONG are for all groups but main.
case $MODEL in
  small)
    CONFIG=configs/counsel-chat.yaml ALPHA=128 RATES='1e-3 3e-3 1e-2 3e-2'
    SETTINGS="data.name=../shared/data/counsel_chat_100k.jsonl model.adapter.r=64 model.adapter.alpha=$ALPHA train.lr=1e-2"
    ROUNDS=run.rounds=5 LONG='run.rounds=50 train.steps=3'
    LAUNCH=${LAUNCH-mpirun -n 6}
    ;;
  llama2-7b)
    CONFIG=configs/llama2-7b-mental-health.yaml ALPHA=16 RATES='5e-5 1e-4 2e-4 4e-4'
    SETTINGS='' ROUNDS=run.rounds=10 LONG=run.rounds=50
    LAUNCH=${LAUNCH-srun --mpi=pmi2}
    ;;
  *)
    echo "study.sh: MODEL=$MODEL: no such model; known are small, llama2-7b" >&2
    exit 2
    ;;
esac
OUT=${OUT:-runs/study}
SEEDS=${SEEDS:-0 1 2}
. "$(dirname "$0")/../trials.sh"

mkdir -p "$OUT"
for group in "${@:-main}"; do
  chosen=()
  case $group in
    main)
      tuned delta method.name=gradualdiff
      tuned full method.name=fedavg model.adapter.kind=full model.quantize=none  # weights in 4 bits cannot change
      tuned merged method.name=fedavg exchange.what=merged model.quantize=none
      tuned centralized method.name=centralized
      tuned local method.name=local
      ;;
    rank)
      for r in 16 32; do seeds "r$r" model.adapter.r=$r model.adapter.alpha=$((r * ALPHA / 64)); done
      seeds base
      seeds r128 model.adapter.r=128 model.adapter.alpha=$((2 * ALPHA))
      ;;
    batch)
      seeds base
      for rows in 8 16 32; do seeds "batch$rows" train.batch_size=$rows; done
      ;;
    clients)
      seeds base
      for count in 20 50; do
        seeds "clients$count" clients.count=$count
        seeds "clients$count-5" clients.count=$count clients.per_round="$(python -c "print(5 / $count)")"
      done
      ;;
    split)
      seeds base
      seeds topic 'clients.split={kind: by, column: topic}'
      seeds dirichlet 'clients.split={kind: dirichlet, column: topic, alpha: 0.1}'
      ;;
    long) for form in none nf4; do seeds "long-$form" $LONG model.quantize=$form; done ;;
    *)
      echo "study.sh: $group: no such group; known are main, rank, batch, clients, split, long" >&2
      exit 2
      ;;
  esac
  tell "$group"
done
