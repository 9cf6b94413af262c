"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): factors are averaged, and the base takes what that leaves out.

    server    broadcast A_t, B_t and the residual's factors (in the first round of a start all that the base has gained)
    client i  W <- W + s R; A_i, B_i <- local training from A_t, B_t; send them
    server    A_{t+1} = sum_i p_i A_i, B_{t+1} = sum_i p_i B_i
              R = sum_i p_i B_i A_i - B_{t+1} A_{t+1} = [B_1 .. B_K, -B_{t+1}] [p_1 A_1; ..; p_K A_K; A_{t+1}]

The model after a round is then the mean of the clients' models: W + s sum_i p_i B_i A_i. R's rank is that of all
clients' together, and its factors travel. Its published code adds the transpose of R, which is right for GPT-2's Conv1D
alone; here each kind of layer takes it as it keeps its weights. The result is a whole model.
"""

import numpy as np

from gdmpi import flat, lowrank, method
from gdmpi.config import Section


class Options(Section):
    """The method has no options of its own."""


class Server(method.Server):
    per_client = True
    whole = True  # a start's first message tells all: clients know nothing yet

    def __init__(self, options, context):
        super().__init__(options, context)
        self.weights, self.changes = context.initial, lowrank.nothing(context.initial.schema)
        self.stacks, self.taken = {}, []

    def broadcast(self, t, client=None):
        news = (self.changes if t > 1 else {}) if self.whole else lowrank.message(self.stacks)
        return {**self.weights, **news}

    def aggregate(self, update):
        self.taken.append((update.weight, update.individual))

    def step(self, t):
        """Average the factors, and stack what that leaves out of the mean of their products."""
        total = sum(weight for weight, _ in self.taken)
        shares = [np.float64(weight) / total for weight, _ in self.taken]
        for name, array in self.weights.items():
            array[...] = sum(share * sent[name] for share, (_, sent) in zip(shares, self.taken, strict=True))
        factors = {}
        for layer in lowrank.layers(self.weights):
            a, b = layer + lowrank.A, layer + lowrank.B
            outer = [*(sent[b] for _, sent in self.taken), -self.weights[b]]
            inner = [share * sent[a] for share, (_, sent) in zip(shares, self.taken, strict=True)]
            factors[layer] = [self.context.scale * each for each in outer], [*inner, self.weights[a]]
        self.stacks = lowrank.stack(factors)
        lowrank.follow(self.changes, lowrank.message(self.stacks))
        self.taken, self.whole = [], False

    def adapter(self):
        return flat.pack({**self.weights, **self.changes})

    def state(self):
        return {"weights": self.weights, "changes": self.changes}

    def restore(self, arrays):
        self.weights.buffer[:] = arrays["weights"].buffer
        self.changes.buffer[:] = arrays["changes"].buffer


class Client(method.Client):
    incremental = rebases = True

    def load(self, t, message):
        model = self.context.model
        model.rebase(t, message)
        model.load(flat.pack({name: message[name] for name in model.schema.places}))

    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client)
        learnt = self.context.model.leaves()
        return method.Update(individual=learnt, examples=self.context.examples[self.client], metrics=metrics)


def nbytes(config, schema, row):
    """A client sends its factors and receives their mean and the residual's, of the cohort's rank and the mean's."""
    return {"up": schema.nbytes, "down": (row["clients"] + 2) * schema.nbytes}
