"""A method that sees every update by itself: the server averages the clients' deltas, one client at a time."""

import numpy as np

from gdmpi import method
from gdmpi.config import Section


class Options(Section):
    """None."""


class Server(method.Server):
    per_client = True

    def __init__(self, options, context):
        super().__init__(options, context)
        self.weights, self.clients = context.initial, []

    def broadcast(self, t, client=None):
        return self.weights

    def aggregate(self, update):
        assert self.clients == sorted(self.clients)  # clients come in ascending order
        self.clients.append(update.client)
        if len(self.clients) == 1:
            self.sum, self.weight = np.zeros(self.weights.vector.size), 0
        self.sum += update.individual["delta"].astype(np.float64) * update.weight
        self.weight += update.weight

    def step(self, t):
        self.weights.vector[:] += (self.sum / self.weight).astype(np.float32)
        self.clients = []

    def adapter(self):
        return self.weights

    def state(self):
        return {"weights": self.weights}

    def restore(self, arrays):
        self.weights.buffer[:] = arrays["weights"].buffer


class Client(method.DeltaClient):
    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client)
        # the delta's memory is shared by all clients of the rank: the program must keep what each of them sent
        delta = self.context.model.delta(self.start)
        return method.Update(
            individual={"delta": delta.vector},
            examples=self.context.examples[self.client],
            metrics=metrics,
        )


def nbytes(config, schema, row):
    """A client sends its delta by itself and receives the adapter."""
    return {"up": schema.nbytes, "down": schema.nbytes}
