"""Which clients take part in a round, and which rank hosts whom."""

from gdmpi import rng


def cohort(seed, t, count, per_round):
    """The clients of round t, ascending: all, or a sample of at least one drawn without replacement."""
    if per_round == 1:
        return list(range(count))
    size = max(1, round(per_round * count))
    return sorted(rng.stream(seed, "cohort", t).choice(count, size, replace=False).tolist())


def hosts(count, ranks):
    """The rank that hosts each client, list of length count: dealt in turn over the given client ranks.

    A client stays with its rank: its rows and its state need never move. More ranks than clients leaves some
    without; they still help to evaluate.
    """
    return [ranks[client % len(ranks)] for client in range(count)]
