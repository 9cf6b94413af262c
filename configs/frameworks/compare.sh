#!/usr/bin/env bash
# The three frameworks of arXiv 2501.04436 beside each other, and the methods that average LoRA's factors, in groups; a run
# is resumed where it stopped, and what is done is not done again:
#
#   configs/frameworks/compare.sh frameworks     FedLLM, KD-FedLLM, Split-FedLLM on SST-2: accuracy, bytes, work, memory
#   configs/frameworks/compare.sh architectures  KD-FedLLM where two of five clients have a GPT-2, not a Llama
#   configs/frameworks/compare.sh family         delta, FedIT, FFA, RoLoRA, FLoRA, FedEx on counsel_chat, rows dealt at
#                                                random: at equal tokens, and at equal bytes
#   configs/frameworks/compare.sh topics         the same with two of ten topics for each client, at family's best rates
#   configs/frameworks/compare.sh texts          KD-FedLLM on counsel_chat, where the likeliest tokens travel, beside
#                                                family's FedIT and clients by themselves
#
# Every method has the same learning rates tried, with seed 0. Tables (show) and figures (plot) of a group are written
# beside its runs. Start it in an environment with gdmpi[plot], from the project's root, with the texts and the model that
# the files in configs/ name in ../shared. OUT (runs/frameworks), SEEDS (0 1 2) and LAUNCH (mpirun -n 6) may be set.
set -euo pipefail
OUT=${OUT:-runs/frameworks}
SEEDS=${SEEDS:-0 1 2}
LAUNCH=${LAUNCH-mpirun -n 6}
KNOWN='frameworks, architectures, family, texts, topics'
. "$(dirname "$0")/../trials.sh"

FAMILY='gradualdiff fedit ffa rolora flora fedex'

# gpt2 DIRECTORY: a GPT-2 as small as the Llama, with its tokenizer, that has read the same stories for three epochs
gpt2() {
  [ ! -d "$1" ] || return 0
  python - "../shared/models/tinystories-656k" "$1.new" <<'END'
import sys
import torch, transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(0)
ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
sizes = {"n_embd": 128, "n_layer": 2, "n_head": 8, "n_positions": 512}
network = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **ends))
network.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
END
  python -m gdmpi run run.out="$OUT" run.name=gpt2 run.rounds=3 clients.count=1 method.name=centralized model.name="$1.new" \
    model.adapter.kind=full data.name="../shared/data/tinystories_train.jsonl" data.validation=0.05 data.test=0 train.lr=1e-3
  mv "$OUT/gpt2/model" "$1"
}

# told GROUP: tell() at equal tokens, which is all rounds, and a table at as many bytes as the first method has sent
told() {
  tell "$1"
  sent=$(python -m gdmpi show --format json "${chosen[@]}" | python -c "
import json, sys
print(json.load(sys.stdin)['lines'][0]['bytes'])")
  python -m gdmpi show --format markdown --at bytes="$sent" "${chosen[@]}" | tee "$OUT/$1-bytes.md"
}

for group in "$@"; do
  [[ ", $KNOWN, " == *", $group, "* ]] ||
    { echo "compare.sh: $group: no such group; known are $KNOWN" >&2 && exit 2; }
done
mkdir -p "$OUT"
for group in "${@:-frameworks}"; do
  chosen=()
  case $group in
    frameworks)
      SETTINGS='' BEST=eval_accuracy RATES='1e-3 3e-3 1e-2'
      for CONFIG in configs/frameworks/{fedllm,kd,split}.yaml; do
        tuned "$(basename "$CONFIG" .yaml)"
      done
      tell "$group"
      ;;
    architectures)
      SETTINGS='' BEST=eval_accuracy RATES='1e-3 3e-3 1e-2' CONFIG=configs/frameworks/kd.yaml
      gpt2 "$OUT/gpt2-stories"
      tuned kd
      tuned kd-mixed "model.others={3: $OUT/gpt2-stories, 4: $OUT/gpt2-stories}"
      tell "$group"
      ;;
    family | topics | texts)
      RATES='3e-3 1e-2 3e-2'
      SETTINGS="data.name=../shared/data/counsel_chat_100k.jsonl run.rounds=5" BEST=eval_loss CONFIG=configs/counsel-chat.yaml
      if [ "$group" = texts ]; then
        tuned kd-texts method.name=kd data.public=0.1 method.top_k=16 method.server_epochs=4
        tuned fedit method.name=fedit
        tuned local method.name=local
        tell "$group"
        continue
      fi
      for method in $FAMILY; do
        if [ "$group" = family ]; then
          tuned "$method" method.name="$method"
        else
          rate=$(best "$method")
          ROUNDS=train.lr=${rate:?"$method has no best rate: play the group family first"}
          seeds "topics-$method" method.name="$method" 'clients.split={kind: by, column: topic}'
        fi
      done
      told "$group"
      ;;
  esac
done
