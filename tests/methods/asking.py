"""A method that talks during training: each client asks how far to go, the server counts what it was asked."""

import numpy as np

from gdmpi import method
from gdmpi.config import Section


class Options(Section):
    first: float = 1.0


class Server(method.Server):
    def __init__(self, options, context):
        super().__init__(options, context)
        self.weights, self.asked = context.initial, np.zeros(context.clients, np.int64)

    def broadcast(self, t, client=None):
        return self.weights

    def answer(self, t, client, question):
        self.asked[client] += 1
        return {"scale": np.float32([self.options.first / (t + question["examples"][0] / 100)])}

    def aggregate(self, update):
        self.mean = update.mean.vector

    def step(self, t):
        self.weights.vector[:] += self.mean
        return {"asked": int(self.asked.sum())}

    def adapter(self):
        return self.weights

    def state(self):
        return {"weights": self.weights, "asked": self.asked}

    def restore(self, arrays):
        self.weights.buffer[:], self.asked = arrays["weights"].buffer, arrays["asked"]


class Client(method.Client):
    asks = True

    def load(self, t, message):
        self.start = message
        self.context.model.load(message)

    def local_update(self, t, ask=None):
        examples = self.context.examples[self.client]
        scale = ask({"examples": np.int64([examples])})["scale"][0]
        metrics = self.context.train(t, self.client)
        delta = self.context.model.delta(self.start)
        delta.vector[:] *= scale
        return method.Update(mean=delta, examples=examples, metrics=metrics)
