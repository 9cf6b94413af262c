"""What evaluating costs a token, against training: the same rows, in one process, passes alternating.

Perplexity needs a forward pass only, over whole batches of held-out rows. Both sides count the tokens that carry loss.
"""

import argparse
import tempfile
import time
from pathlib import Path

import common


def measure(words, runs):
    """Seconds per thousand target tokens, [(training, evaluation)], and how many tokens there are."""
    from gdmpi import build, config as configuration, evaluate, libraries, mpi, train

    with tempfile.TemporaryDirectory() as place:
        words = [*words, "clients.count=1", "train.epochs=1", f"run.out={place}", f"run.cache={place}/cache"]
        config = configuration.load(words[0] if words[0].endswith(".yaml") else None, [w for w in words if "=" in w])
        libraries.environment(config.run.cache)
        from mpi4py import MPI

        parts = build.build(mpi.Link(MPI.COMM_SELF), config)
        config, rows = parts.config, parts.rows[0].take(range(min(96, len(parts.rows[0]))))
        trainer = train.Trainer(parts.trainable, config, {0: rows})
        start, batches, found = parts.trainable.values(), range(len(evaluate.plan(rows))), []
        for _ in range(runs + 1):
            parts.trainable.load(start)
            begun = time.perf_counter()
            trainer(1, 0)
            trained = time.perf_counter()
            evaluate.losses(parts.trainable, rows, batches)
            found.append((trained - begun, time.perf_counter() - trained))
    tokens = rows.target_tokens
    return [tuple(1000 * seconds / tokens for seconds in pair) for pair in found[1:]], tokens


def jobs(place):
    """{name: words}: the real texts with their model, and with a Llama of 15 million parameters."""
    found = common.jobs()
    if "counsel-chat" in found:
        large = common.llama(Path(place) / "llama", common.SHARED / "models" / "tinystories-656k")
        words = found["counsel-chat"]
        found["counsel-chat, 15 million parameters"] = [w for w in words if "model.name" not in w] + [
            f"model.name={large}",
            "model.adapter.r=64",
        ]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each, alternating (default: %(default)s)")
    runs = parser.parse_args().runs
    print(common.head("job", "target tokens", "training, s a 1,000", "evaluation, s a 1,000", "evaluation to training"))
    with tempfile.TemporaryDirectory() as place:
        for name, words in jobs(place).items():
            pairs, tokens = measure(words, runs)
            seconds = [common.spread(side, "{:.3f}") for side in zip(*pairs, strict=True)]
            ratio = common.spread([evaluation / training for training, evaluation in pairs], "{:.2f}")
            print(common.row(name, f"{tokens:,}", *seconds, ratio), flush=True)


if __name__ == "__main__":
    main()
