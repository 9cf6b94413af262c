"""FLoRA (Wang et al., arXiv 2409.05976): what clients learn is stacked, not averaged, and becomes a part of the base.

    server    broadcast the stack of round t-1 (in the first round of a start: all that the base has gained)
    client i  W <- W + s B_stack A_stack; A_i drawn anew, B_i = 0, both of rank r_i
              A_i, B_i <- local training; send them
    server    B_stack = [B_1 .. B_K], A_stack = [p_1 A_1; ..; p_K A_K], so that B_stack A_stack = sum_i p_i B_i A_i

The mean of the products itself, nothing lost, and clients may have adapters of different rank. The weights p_i are on
one side alone. Of a base in 4 or 16 bits, what it has gained stays beside it in bfloat16, since rounding the sum
would lose most of that. The result is a whole model.
"""

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from gdmpi import flat, lowrank, method
from gdmpi.config import Section
from gdmpi.errors import UserError


class Options(Section):
    """ranks: of the clients, dealt in turn; null: all have model.adapter.r, which is the most that any may have."""

    ranks: Annotated[list[int], Field(min_length=1)] | None = None

    def refusal(self, config):
        most = config.model.adapter.r
        wrong = [r for r in self.ranks or [] if not 1 <= r <= most]
        return f"ranks: {wrong[0]} is not between 1 and model.adapter.r, {most}" if wrong else None


class Server(method.Server):
    per_client = True
    whole = True  # a start's first message tells all: clients know nothing yet

    def __init__(self, options, context):
        super().__init__(options, context)
        self.changes, self.stacks, self.taken = lowrank.nothing(context.initial.schema), {}, []

    def broadcast(self, t, client=None):
        return (self.changes if t > 1 else {}) if self.whole else lowrank.message(self.stacks)

    def aggregate(self, update):
        self.taken.append((update.weight, update.individual))

    def step(self, t):
        total, scale = sum(weight for weight, _ in self.taken), self.context.scale
        self.stacks = lowrank.stack(
            {
                layer: (
                    [scale * sent[layer + lowrank.B] for _, sent in self.taken],
                    [weight / total * sent[layer + lowrank.A].astype(np.float64) for weight, sent in self.taken],
                )
                for layer in lowrank.layers(self.context.initial)
            }
        )
        lowrank.follow(self.changes, lowrank.message(self.stacks))
        self.taken, self.whole = [], False

    def adapter(self):
        return self.changes

    def state(self):
        return {"changes": self.changes}

    def restore(self, arrays):
        self.changes.buffer[:] = arrays["changes"].buffer


class Client(method.Client):
    weighting = "examples"
    incremental = rebases = True

    def __init__(self, options, context, client):
        super().__init__(options, context, client)
        self.rank = options.ranks[client % len(options.ranks)] if options.ranks else None
        shapes = {layer: shape for layer, shape in lowrank.shapes(context.model.schema).items() if options.ranks}
        for layer, shape in shapes.items():
            if self.rank > min(shape):
                raise UserError(f"method.ranks: {self.rank} is above the size of {layer}, {shape[0]} x {shape[1]}")

    def load(self, t, message):
        self.context.model.rebase(t, message)
        self.context.model.load(self.fresh(t))

    def fresh(self, t):
        """The adapter that round t begins with: A as peft draws it (He et al., arXiv 1502.01852), B zero."""
        values, draw = flat.Flat(self.context.model.schema), self.context.stream("fresh", t, max(0, self.client))
        for layer in lowrank.layers(values):
            rows = values[layer + lowrank.A][: self.rank]
            bound = 1 / math.sqrt(rows.shape[1])
            rows[...] = draw.uniform(-bound, bound, rows.shape)
        return values

    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client)  # rows of A and columns of B above the rank are zero, and stay so
        learnt = self.context.model.leaves()
        sent = {}
        for layer in lowrank.layers(learnt):
            sent[layer + lowrank.A] = learnt[layer + lowrank.A][: self.rank]
            sent[layer + lowrank.B] = learnt[layer + lowrank.B][:, : self.rank]
        return method.Update(individual=sent, examples=self.context.examples[self.client], metrics=metrics)


def nbytes(config, schema, row):
    """A client sends its factors and receives those of the whole cohort, float32; with adapters all of one rank."""
    return {"up": schema.nbytes, "down": row["clients"] * schema.nbytes}
