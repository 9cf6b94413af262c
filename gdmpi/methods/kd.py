"""KD-FedLLM (Yan, Su, Deng and Schober, arXiv 2501.04436): answers to public rows travel, and no weights.

    server    broadcast T_t                                         nothing in the first round
    client i  n_d steps from w_i on (1 - a) CE + a tau^2 KL(T_t || z)       once there is a T_t: distillation, with CE
                                                                    over rows of its own
              w_i <- local training from there, on its own rows
              send z_i, what it answers to the public rows
    server    T = sum_i p_i z_i                                     p_i = 1/K, or n_i/n with method.weighting: examples
              w <- n_s steps on tau^2 KL(T || z)                    the server's own adapter
              T_{t+1} = T, or with teacher: server what the server's model answers

w_i and w never leave, and are not averaged: clients may have bases of different architectures (model.others), as long
as a token is the same number to all of them. With evaluation.labels z is the log-likelihood of each label for each
public row (logits, whose mean is exact for any number of ranks); without, the top_k likeliest tokens at the response's
positions, with their probabilities at temperature tau and a tail for all others, and these are averaged as
probabilities: the logits of what a client did not list are not known. n_d and n_s are epochs over the public rows; an
optimiser begins anew in each distillation. FedMD (arXiv 1910.03581) has clients learn from the mean of their scores,
and FedDF (arXiv 2006.07242) distils it at the server.
"""

from typing import Annotated, Literal

from pydantic import Field

from gdmpi import distil, method
from gdmpi.config import Positive, Section
from gdmpi.errors import UserError

EXAMPLE = {"data.public": 0.03, "method.top_k": 8, "method.positions": 8}
NOBODY = -1  # the server, where a client's number is wanted


class Options(Section):
    top_k: Positive | None = None  # of texts: tokens a position that travel; none with evaluation.labels
    positions: Positive | None = None  # of texts: positions of a row that are looked at, evenly spaced; null: all
    temperature: Annotated[float, Field(gt=0)] = 2.0
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the teacher in a client's distillation
    epochs: Positive = 1  # n_d, of a client's distillation
    server_epochs: Positive = 1  # n_s, of the server's
    teacher: Literal["mean", "server"] = "mean"  # what clients learn from: their mean, or the server's model

    def refusal(self, config):
        if config.evaluation.labels and (self.top_k or self.positions):
            key = "top_k" if self.top_k else "positions"
            return f"{key}: with evaluation.labels the logits of all labels travel; leave it out"
        if not config.evaluation.labels and not self.top_k:
            what = "without evaluation.labels there are no classes to send logits of"
            return f"top_k: {what}; name the labels, or give method.top_k=16 for texts"
        return None


def nbytes(config, schema, row):
    """Logits are 4 bytes a public row and label; of texts an id is 2 or 4 bytes a position and token, a share 2."""
    each = 4 * len(config.evaluation.labels or ()) or method.options(config).top_k * (row["server"]["id_bytes"] + 2)
    return dict.fromkeys(("up", "down"), row["server"]["answers"] * each)


def _places(options, public):
    return public if options.positions is None else distil.spaced(public, options.positions)


class Half:
    """What both halves do with the public rows."""

    def prepare(self):
        if self.options.top_k and self.options.top_k > self.context.vocabulary:
            many = f"{self.options.top_k:,} tokens a position are more than the {self.context.vocabulary:,} there are"
            raise UserError(f"method.top_k: {many}; give fewer")
        self.public = _places(self.options, self.context.public)

    def respond(self, client):
        asked, train = self.options, self.context.train
        return distil.respond(train, client, self.public, asked.temperature, asked.top_k, self.context.vocabulary)

    def distil(self, t, client, teacher, epochs, alpha):
        return distil.steps(
            self.context.train, t, client, self.public, teacher, self.options.temperature, epochs, alpha
        )


class Server(Half, method.Server):
    models = public = True

    @staticmethod
    def per_client(options):
        return options.top_k is not None

    @staticmethod
    def travels(options, public, vocabulary):
        return [distil.nbytes(_places(options, public), options.top_k, vocabulary)] * 2

    def __init__(self, options, context):
        super().__init__(options, context)
        self.weights, self.teacher, self.received = context.initial, {}, []
        if context.model:
            self.prepare()
            context.model.load(self.weights)

    def broadcast(self, t, client=None):
        return self.teacher

    def aggregate(self, update):
        self.received.append((update.weight, update.individual or update.mean))

    def step(self, t):
        mean, self.received = distil.mean(self.received, self.options.top_k), []
        loss, _ = self.distil(t, NOBODY, mean, self.options.server_epochs, 1.0)
        self.weights.buffer[:] = self.context.model.values().buffer
        self.teacher = mean if self.options.teacher == "mean" else self.respond(NOBODY)
        first = next(iter(mean.values()))
        return {"distil_loss": loss, "answers": len(first), "id_bytes": first.itemsize}

    def adapter(self):
        return self.weights

    def state(self):
        return {"weights": self.weights} | {f"teacher.{name}": array for name, array in self.teacher.items()}

    def restore(self, arrays):
        arrays = dict(arrays)
        self.weights.buffer[:] = arrays.pop("weights").buffer
        self.teacher = {name.removeprefix("teacher."): array for name, array in arrays.items()}
        if self.context.model:
            self.context.model.load(self.weights)


class Client(Half, method.PersonalClient):
    mixed = True

    def __init__(self, options, context, client):
        super().__init__(options, context, client)
        self.prepare()
        self.weights = context.model.values()

    def load(self, t, message):
        self.teacher = message
        self.context.model.load(self.weights)

    def local_update(self, t, ask=None):
        """Distil the teacher, if there is one yet, train on the client's own rows, and answer the public ones."""
        metrics, seen = {}, 0
        if self.teacher:
            asked = self.options
            metrics["distil_loss"], seen = self.distil(t, self.client, self.teacher, asked.epochs, asked.alpha)
        metrics |= self.context.train(t, self.client)
        self.weights = self.context.model.values()
        answers = self.respond(self.client)
        # tokens that pass through once, and not back, are half the work of others
        metrics["seen"] += seen + len(self.public.tokens) // 2
        kind = "mean" if self.options.top_k is None else "individual"
        return method.Update(**{kind: answers}, examples=self.context.examples[self.client], metrics=metrics)
