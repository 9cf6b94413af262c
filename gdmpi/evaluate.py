"""Held-out rows, sharded over the ranks in fixed batches and summed exactly: the same for any number of ranks."""

import math
from typing import NamedTuple

import numpy as np

BATCH, TOKENS = 16, 2048  # rows, and tokens in a pass; constants of the result's last bits, so no settings


class Score(NamedTuple):
    """What held-out rows came to.

    loss: mean over their target tokens, nats. tokens: how many there are, whoever scores them. accuracy: the share of
    them than which the model held no other likelier. bits_per_byte: the loss in bits over the bytes of UTF-8 that the
    responses have; unlike the loss it compares models with different tokenizers. groups: {group: loss} where rows have
    one. clients: {client: loss} where each client is scored by itself; loss, accuracy and bits_per_byte are then the
    means over the clients, unless there is a global model beside theirs.
    """

    loss: float
    tokens: int
    accuracy: float
    bits_per_byte: float
    groups: dict | None = None
    clients: dict | None = None


def plan(rows):
    """The batches of held-out rows, in order: [list of row ids]. Rows keep their order; a batch never changes."""
    return [list(range(start, min(start + BATCH, len(rows)))) for start in range(0, len(rows), BATCH)]


def losses(model, rows, wanted):
    """{batch number: [(group, loss, tokens, hits, bytes)]}, a row each, for the wanted batches of plan(rows).

    loss: sum over the row's target tokens, in float64. hits: those of them than which no other token was likelier.
    """
    import torch

    model.model.eval()
    result, batches = {}, plan(rows)
    groups = [None] * len(rows) if rows.group is None else rows.group.tolist()
    with torch.inference_mode():
        for number in wanted:
            found = {}
            for ids in model.forward.groups(rows, batches[number], TOKENS):
                each, hits = (tensor.double().cpu().numpy() for tensor in model.forward.scores(rows, ids))
                counts = rows.targets_of(ids)
                places = np.cumsum([0, *counts])[:-1]
                sums = zip(ids, np.add.reduceat(each, places), counts, np.add.reduceat(hits, places), strict=True)
                found |= {i: (groups[i], float(loss), n, int(hit), int(rows.nbytes[i])) for i, loss, n, hit in sums}
            result[number] = [found[i] for i in batches[number]]
    return result


def merged(parts):
    """(values, {client: values}) of the ranks' {batch key: value}, the latter where each client is scored by itself.

    A rank's part is then {"clients": {"client/batch key": value}}; values are of each batch once, for what is counted.
    """
    values, own = {}, {}
    for part in parts:
        for key, value in part.get("clients", {}).items():
            client, _, batch = key.partition("/")
            own.setdefault(int(client), []).append(value)
            values[batch] = value
        values |= {key: value for key, value in part.items() if key not in ("clients", "served")}
    return list(values.values()), {client: own[client] for client in sorted(own)}


def total(parts):
    """The Score over all batches, from what losses() gave on each rank."""
    batches, own = merged(parts)
    rows, found = [row for batch in batches for row in batch], served(parts)
    each = {str(client): _score([row for batch in values for row in batch]) for client, values in own.items()}
    clients = {client: score.loss for client, score in each.items()}
    if found or not own:
        return _score([row for batch in found for row in batch] or rows)._replace(clients=clients or None)
    loss, accuracy, bits = (
        mean({client: getattr(score, name) for client, score in each.items()})
        for name in ("loss", "accuracy", "bits_per_byte")
    )
    tokens = sum(row[2] for row in rows)
    return Score(loss, tokens, accuracy, bits, clients=clients)


def served(parts):
    """The values of a global model beside the clients' own, which its rank has as {"served": {batch key: value}}."""
    return [value for part in parts for value in part.get("served", {}).values()]


def mean(clients):
    """The mean of {client: number}, each counting alike."""
    return math.fsum(clients.values()) / len(clients)


def _score(rows):
    """The Score of rows as losses() gives them; fsum is exact, so the order in which ranks answered cannot matter."""
    groups = {}
    for row in rows:
        if row[0] is not None:
            groups.setdefault(row[0], []).append(row)
    loss, tokens, hits, nbytes = (math.fsum(row[place] for row in rows) for place in range(1, 5))
    return Score(
        loss / tokens if tokens else math.nan,
        int(tokens),
        hits / tokens if tokens else math.nan,
        loss / math.log(2) / nbytes if nbytes else math.nan,
        {name: _mean(groups[name]) for name in sorted(groups)} or None,
    )


def _mean(rows):
    return math.fsum(row[1] for row in rows) / sum(row[2] for row in rows)


def perplexity(loss):
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
