"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays as it was drawn, equal at all clients; only B is trained and sent.

    server    broadcast B_t (in the first round of a start A, too)
    client i  B_i <- local training of B alone from B_t, on the client's own rows
              send B_i - B_t
    server    B_{t+1} = B_t + lr * sum_i p_i (B_i - B_t)

With one A for all the mean of the products B_i A is the product of the mean: nothing is lost by averaging, at half the
bytes. It wants a larger learning rate than training both.
"""

from gdmpi import method
from gdmpi.config import Section

B = ".lora_B."


class Options(Section):
    """The method has no options of its own."""


class Server(method.VectorServer):
    whole = True  # a start's first message tells all: clients know nothing yet

    def broadcast(self, t, client=None):
        return self.weights if self.whole else self.weights.holding(B)

    def step(self, t):
        self.whole = False
        return self.context.optimizer.step(self.weights.holding(B).vector, self.mean.take())


class Client(method.DeltaClient):
    parts = (B,)
    incremental = True

    def load(self, t, message):
        self.start = message.holding(B)
        self.context.model.load(message)


def nbytes(config, schema, row):
    """A client sends how its B changed and receives B, float32."""
    size = sum(size for name, (_, size, *_) in schema.places.items() if B in name)
    return {"up": size, "down": size}
