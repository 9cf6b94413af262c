"""Split-FedLLM (arXiv 2501.04436), laid out as SplitFed (arXiv 2004.12088): the model is cut after some of its blocks.

    server    broadcast w_t = (u_t, v_t)                  u before the cut, v behind it
    client i  in a step, for each pass over rows x with labels y:
                  send a = front(x; u_i)                  hidden states at the cut
    server        loss of rest(a; v_i) at y; send back d loss / d a
    client i      d loss / d u_i from it
              step of u_i at the client, of v_i at the server; after the last one send u_i - u_t
    server    u_{t+1} = u_t + lr * sum_i p_i (u_i - u_t)
              v_{t+1} = v_t + lr * sum_i p_i (v_i - v_t)

server: per_client keeps a v_i for each client (SplitFed's V1): federated averaging of the whole model, but that each
half clips its own gradient. With server: shared all train one v (V2), client after client in ascending order, while the
others wait: a rank trains its clients in that order, and an order of arrival would not give the same bits twice.

labels: client is the U-shape: the server returns the last hidden states, head and loss are the client's, who sends
their gradient: two round trips a pass, and no label leaves a client.

What crosses the cut is in the dtype of computing. Both sides train by the section train; moments last for a round, or
with train.keep_optimizer for the run. v travels to the clients too, only so that they score rows with the whole model.
"""

from typing import Literal

import numpy as np

from gdmpi import halves, method, server_opt, train
from gdmpi.config import Positive, Section

SHARED = -1  # for whom the one v is


class Options(Section):
    cut: Positive = 1  # blocks that are the clients', behind the embedding
    server: Literal["per_client", "shared"] = "per_client"
    labels: Literal["server", "client"] = "server"

    def refusal(self, config):
        if config.model.adapter.kind == "full":
            return "name: split trains an adapter, by halves; leave model.adapter.kind out"
        if config.exchange.what == "merged":
            return "name: split trains an adapter, by halves; leave exchange.what out"
        if config.train.compile:
            return "name: split runs halves of a model, which are not compiled; leave train.compile out"
        if config.clients.boundary == "site" and self.labels == "server":
            return "labels: labels would leave the sites, which clients.boundary: site forbids; say client"
        return None


class Server(method.VectorServer):
    models = True

    def __init__(self, options, context):
        super().__init__(options, context)
        self.in_turn = options.server == "shared"
        self.parts, self.shares, self.moments, self.passed = {}, {}, {}, {}
        if context.model:
            self.halves = halves.halved(context.model, options.cut)
            context.model.model.train()

    def answer(self, t, client, question):
        """The rest of a pass: forward if hidden states come, backward if what that needs comes; at its end a step."""
        who, reply = SHARED if self.in_turn else client, {}
        if who not in self.parts:
            start, moments = self.weights.vector[self.halves.place], self.moments.get(who)
            self.parts[who] = train.Part(self.context.model, self.context.section, self.halves.place, start, moments)
        part = self.parts[who]
        with part.inside():
            if "hidden" in question:
                part.passes += 1
                hidden = self.halves.to_tensor(question["hidden"]).requires_grad_()
                with self.context.fork(f"rest {part.passes}", t, client):
                    self.passed[client] = hidden, self.halves.rest(hidden, question["lengths"].tolist())
            if "step" not in question:
                return {"out": self.halves.to_array(self.passed[client][1])}
            (hidden, out), (count, lr, last, examples) = self.passed.pop(client), question["step"]
            if "targets" in question:
                places, targets = (self.halves.to_tensor(question[name]).long() for name in ("places", "targets"))
                losses = self.halves.forward.losses_at(out, places, targets)
                (losses.sum() / count).backward()
                reply["loss"] = losses.detach().double().sum().cpu().numpy()
            else:
                out.backward(self.halves.to_tensor(question["gradient"]).to(out.dtype))
        if last:
            part.step(lr)
            self.shares[who] = examples if self.context.weighting == "examples" else 1
        return reply | {"gradient": self.halves.to_array(hidden.grad)}

    def step(self, t):
        """One step over both halves: the clients' mean, as it was summed, and the mean of the server's copies."""
        weights, place, mean = self.weights.vector, self.halves.place, self.mean.take()
        rest = np.zeros(place.stop - place.start)
        for who, part in sorted(self.parts.items()):
            rest += self.shares[who] / sum(self.shares.values()) * (part.values().astype(np.float64) - weights[place])
        if not np.isfinite(rest).all():
            raise FloatingPointError("the server's half is not finite; a lower train.lr or train.clip_norm may help")
        if self.context.section.keep_optimizer:
            self.moments |= {who: part.moments() for who, part in self.parts.items()}
        self.parts, self.shares = {}, {}
        lengths = self.context.optimizer.step(weights, np.concatenate([mean, rest.astype(np.float32)]))
        return lengths | {"mean_norm": server_opt.norm(mean)}  # of the clients' half, as their own norms are

    def state(self):
        kept = {f"moments.{who}.{name}": array for who, own in self.moments.items() for name, array in own.items()}
        return super().state() | kept

    def restore(self, arrays):
        for name in [name for name in arrays if name.startswith("moments.")]:
            _, who, own = name.split(".")
            self.moments.setdefault(int(who), {})[own] = arrays[name]
        super().restore({name: array for name, array in arrays.items() if not name.startswith("moments.")})


class Client(method.Client):
    asks = True

    def __init__(self, options, context, client):
        super().__init__(options, context, client)
        if context.train:  # else it only evaluates
            self.halves = halves.halved(context.model, options.cut, options.labels == "client")
            context.train.only(self.halves.before)

    @staticmethod
    def sends(options, model, schema):
        return halves.before(model, schema, options.cut)

    def load(self, t, message):
        self.start = message
        self.context.model.load(message)

    def local_update(self, t, ask=None):
        self.ask = ask
        metrics = self.context.train(t, self.client, backward=self._pass)
        metrics["flops"] = train.flops(*self.halves.parameters(), metrics["seen"])
        delta = self.context.model.delta(self.start.first(self.halves.before))
        return method.Update(mean=delta, examples=self.context.examples[self.client], metrics=metrics)

    def _pass(self, rows, ids, step):
        """Add a pass's part of the gradient before the cut; returns the sum of the losses of its tokens."""
        tokens, lengths, places, targets = self.halves.forward.lay(rows, ids)
        hidden = self.halves.first(tokens, lengths)
        question = {"hidden": self.halves.to_array(hidden), "lengths": np.int32(lengths)}
        step = {"step": np.float64([*step, self.context.examples[self.client]])}
        if self.options.labels == "server":
            labels = {"places": places, "targets": targets}
            answer = self.ask(question | step | {name: each.int().cpu().numpy() for name, each in labels.items()})
            loss = answer["loss"].item()
        else:
            out = self.halves.to_tensor(self.ask(question)["out"]).requires_grad_()
            losses = self.halves.forward.losses_at(out, places, targets)
            (losses.sum() / step["step"][0]).backward()
            answer, loss = self.ask({"gradient": self.halves.to_array(out.grad)} | step), losses.double().sum().item()
        hidden.backward(self.halves.to_tensor(answer["gradient"]).to(hidden.dtype))
        return loss


def nbytes(config, schema, row):
    """Beside how its half changed a client sends hidden states, token by token, and receives as many gradients.

    That is where a step is one pass over batch_size rows; with each go the rows' lengths, and labels or a loss.
    """
    block = {name: int(next(part for part in name.split(".") if part.isdigit())) for name in schema.places}
    half = sum(size for name, (_, size, *_) in schema.places.items() if block[name] < config.method.cut)
    width = schema.entries[0][2][1]  # of what goes into the first layer: that of the hidden states
    labels, element = config.method.labels == "server", 2 if config.train.dtype == "bfloat16" else 4
    crossing = (1 if labels else 2) * row["seen_tokens"] * width * element
    asked = crossing + row["steps"] * (4 * 8 + 4 * config.train.batch_size) + 2 * 4 * row["tokens"] * labels
    answered = crossing + 8 * row["steps"] * labels
    return {"up": half + round(asked / row["clients"]), "down": schema.nbytes + round(answered / row["clients"])}
