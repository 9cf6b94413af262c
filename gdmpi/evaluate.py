"""Held-out loss, sharded over the ranks in fixed batches and summed exactly: the same for any number of ranks."""

import math
from typing import NamedTuple

BATCH, TOKENS = 16, 2048  # rows, and tokens in a pass; constants of the result's last bits, so no settings


def plan(rows):
    """The batches of held-out rows, in order: [list of row ids]. Rows keep their order; a batch never changes."""
    return [list(range(start, min(start + BATCH, len(rows)))) for start in range(0, len(rows), BATCH)]


def losses(model, rows, wanted):
    """{batch number: (sum of losses, target tokens)} for the wanted batches of plan(rows).

    Each row's loss is that of its target tokens; a batch's is their sum in float64.
    """
    import torch

    model.model.eval()
    result, batches = {}, plan(rows)
    with torch.inference_mode():
        for number in wanted:
            parts = [model.forward.losses(rows, ids) for ids in model.forward.groups(rows, batches[number], TOKENS)]
            result[number] = (sum(float(part.double().sum()) for part in parts), sum(len(part) for part in parts))
    return result


class Score(NamedTuple):
    """A mean loss over so many target tokens; clients: {client: loss}, where each is scored by itself, or None.

    The loss is then the mean over the clients, and the tokens are those of all of them.
    """

    loss: float
    tokens: int
    clients: dict | None = None


def total(parts):
    """The Score over all batches, from the ranks' {batch key: (sum, tokens)}.

    Where each client is scored by itself they are {"clients": {"client/batch key": (sum, tokens)}}.
    """
    merged, own = {}, {}
    for part in parts:
        for key, value in part.pop("clients", {}).items():
            own.setdefault(int(key.partition("/")[0]), []).append(value)
        merged.update(part)
    if own:
        each = {client: _mean(own[client]) for client in sorted(own)}
        losses = {str(client): loss for client, (loss, _) in each.items()}
        return Score(math.fsum(losses.values()) / len(losses), sum(tokens for _, tokens in each.values()), losses)
    return Score(*_mean(merged.values()))


def _mean(sums):
    """(mean, count) of [(sum, count)]; fsum is exact, so the order in which ranks answered cannot matter."""
    values, counts = zip(*sums, strict=True) if sums else ((), ())
    return (math.fsum(values) / sum(counts) if sum(counts) else math.nan), sum(counts)


def perplexity(loss):
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
