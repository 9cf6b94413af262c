"""Which clients take part in a round, which rank hosts whom, and how many steps each of them does."""

import math

from gdmpi import method, rng

UNEQUAL = 10  # times the rows of the smallest client that the largest may have before it is said


def pooled(config):
    """Whether client 0 has the rows of all clients, and there are no others in any round."""
    return method.load(config.method.name).Client.pooled


def personal(config):
    """Whether each client has a model of its own, and is evaluated by itself."""
    return method.load(config.method.name).Client.personal


def rebases(config):
    """Whether the base changes beside the adapter."""
    return method.load(config.method.name).Client.rebases


def serves_model(config):
    """Whether the server has a model of its own, beside those of the ranks that host clients."""
    return method.load(config.method.name).Server.models


def asks(config):
    """Whether clients ask the server while they train."""
    return method.load(config.method.name).Client.asks


def sent(config, model, schema):
    """Schema of what an update holds; UserError if the method's options do not fit the model."""
    return method.load(config.method.name).Client.sends(method.options(config), model, schema)


def promised(config, schema, t):
    """[down, up]: bytes that a client receives after round t and sends in it, by the formula of the method.

    schema: of what is trained. None if the method has no formula, or one that wants what only the round itself tells.
    """
    formula = getattr(method.load(config.method.name), "nbytes", None)
    try:
        found = formula and formula(config, schema, {"round": t, "clients": len(cohort(config, t))})
    except KeyError:
        return None
    return found and [found["down"], found["up"]]


def bytes_of(config, schema, codec, t):
    """(down, up): as promised(), or without a formula that of what travels and of what codec, codecs.Exact, sums up."""
    found = promised(config, schema, t)
    if found is None:
        return schema.nbytes, codec.nbytes()
    wider = 1 if gathers(config) else codec.dtype.itemsize // 4  # sums of more than 64 clients have wider elements
    return found[0], wider * found[1]


def gathers(config):
    """Whether updates arrive one by one: what Server.per_client says, or says of the method's options."""
    said = method.load(config.method.name).Server.per_client
    return said(method.options(config)) if callable(said) else said


def scattered(config):
    """Whether there is no global model: what a run comes to is a model for each client."""
    return personal(config) and not serves_model(config)


def alone(config):
    """Whether nothing of what clients learn reaches others: they have pooled their rows, or each is by itself."""
    return pooled(config) or scattered(config)


def cohort(config, t):
    """The clients of round t, ascending: all, or a sample of at least one drawn without replacement."""
    if pooled(config):
        return [0]
    count = config.clients.count
    if config.clients.per_round == 1:
        return list(range(count))
    return sorted(rng.stream(config.run.seed, "cohort", t).choice(count, _sample(config), replace=False).tolist())


def _sample(config):
    return max(1, round(config.clients.per_round * config.clients.count))


def hosts(config, ranks):
    """The rank that hosts each client, list of length clients.count: dealt in turn over the given client ranks.

    A client stays with its rank: its rows and its state need never move. More ranks than clients leaves some
    without; they still help to evaluate. Pooled rows are all with the first.
    """
    return [ranks[0 if pooled(config) else client % len(ranks)] for client in range(config.clients.count)]


def unequal(config, rows):
    """[a line] if clients with so many training rows each are very unequal, and their sizes do not count; else []."""
    few, many = max(1, min(rows)), max(rows)
    if alone(config) or config.method.weighting != "uniform" or many <= UNEQUAL * few:
        return []
    sizes = f"{few:,} to {many:,} training rows"
    return [f"clients have {sizes} and each counts the same; method.weighting=examples weighs by rows"]


def steps(config, rows):
    """Optimiser steps in a round of a client with so many rows; of pooled rows as many as a cohort does together."""
    if config.train.steps:
        return config.train.steps * (_sample(config) if pooled(config) else 1)
    return config.train.epochs * math.ceil(rows / config.train.batch_size)
