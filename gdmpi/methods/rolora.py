"""RoLoRA (Chen et al., arXiv 2409.02346): the factors of LoRA take turns, B in odd rounds and A in even ones.

    server    broadcast X_t, the factor that round t-1 trained (in the first round of a start both)
    client i  Y_i <- local training of the other factor Y alone, X as it is, on the client's own rows
              send Y_i - Y_t
    server    Y_{t+1} = Y_t + lr * sum_i p_i (Y_i - Y_t)

As all clients hold the same X, the mean of their products is the product of the means: nothing is lost by averaging, at
half the bytes. B comes first, since it begins as zero. With train.keep_optimizer each factor keeps moments of its own.
"""

from gdmpi import flat, method
from gdmpi.config import Section

FACTORS = (".lora_B.", ".lora_A.")


def turn(t):
    """The number of the factor that is trained in round t."""
    return (t - 1) % 2


class Options(Section):
    """The method has no options of its own."""


class Server(method.VectorServer):
    whole = True  # a start's first message tells all: clients know nothing yet

    def broadcast(self, t, client=None):
        return self.weights if self.whole else self.weights.holding(FACTORS[turn(t - 1)])

    def step(self, t):
        self.whole = False
        return self.context.optimizer.step(self.weights.holding(FACTORS[turn(t)]).vector, self.mean.take())


class Client(method.Client):
    parts = FACTORS
    incremental = True

    def load(self, t, message):
        model = self.context.model
        if model.kept is None:
            model.kept = flat.Flat(model.schema)
        for name, array in message.items():
            model.kept[name][...] = array
        model.load(model.kept)

    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client, part=turn(t))
        delta = self.context.model.delta(self.context.model.kept.holding(FACTORS[turn(t)]))
        return method.Update(mean=delta, examples=self.context.examples[self.client], metrics=metrics)


def nbytes(config, schema, row):
    """A client sends how the round's factor changed and receives it, float32."""
    size = sum(size for name, (_, size, *_) in schema.places.items() if FACTORS[turn(row["round"])] in name)
    return {"up": size, "down": size}
