"""Local training: batches, loss on response tokens, clipping and the optimiser, all on the flat vectors."""

import contextlib
import functools
import math
import resource
import time
from typing import NamedTuple

import numpy as np

from gdmpi import data, estimate, hosting, rng, spread

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW's, as everywhere


class Trainer:
    """Trains any client of this rank on its rows, in the one model that they share; clients of others, in theirs.

    rows: {client: data.Rows}. others: {client: model}. moments: what an optimiser keeps, {client: {name: array}}, with
    keep_optimizer. limit: tokens of a pass.
    """

    def __init__(self, model, config, rows, others=None):
        self.model, self.config, self.rows, self.others, self.moments = model, config, rows, others or {}, {}
        self.limit = estimate.on_cpu(config.train.pass_tokens)
        models = dict.fromkeys((model, *self.others.values()))
        # one a part for all clients and rounds: fresh memory costs page faults, and a paged one never gives its back
        make, decay = OPTIMIZERS[config.train.optimizer], config.train.weight_decay
        self.optimizers = {
            each: [make(each.vector[place], each.gradient[place], decay) for place in each.parts] for each in models
        }
        # {client: spread.sketch()} since the last round; a site shows nothing but its share of a sum
        self.sketches = None if config.clients.boundary == "site" else {}
        self.trained = {each: each.trained for each in models}
        self.banks = {each: spread.bank(schema) for each, schema in self.trained.items()}
        self.on_step = None  # called with (client, steps done, steps of the round, target tokens so far)
        self.seconds = 0.0  # spent in local training since the last round

    def only(self, schema):
        """Train but the first parameters, those of a schema, from now on: moments and sketches are of these."""
        model = self.model
        if schema == self.trained[model]:
            return
        self.trained[model], place, section = schema, slice(schema.nbytes // 4), self.config.train
        own = model.vector[place], model.gradient[place]
        self.optimizers[model] = [OPTIMIZERS[section.optimizer](*own, section.weight_decay)]

    def of(self, client):
        """The model that a client is trained in; of one that has no rows here, as of the server, the shared one."""
        return self.others.get(client, self.model)

    def __call__(self, t, client, part=0, backward=None):
        """Run round t's local steps of a client from where the model stands; returns metrics.

        part: which of the model's parts is trained.

        loss: mean over the target tokens trained on. tokens: target tokens. steps. seen: tokens passed through.
        backward(rows, ids, step), if given, does a pass in the place of _backward() below.
        """
        import torch

        section, rows, model = self.config.train, self.rows[client], self.of(client)
        backward = backward or functools.partial(_backward, model)
        limit, start = self.limit, time.perf_counter()
        steps = hosting.steps(self.config, len(rows))
        optimizer, kept = self.optimizers[model][part], f"{part}." * (len(model.parts) > 1)
        optimizer.reset()
        known = self.moments.get(client, {})
        moments = {name: known[kept + name] for name in optimizer.state() if kept + name in known}
        if moments:
            optimizer.restore(moments)
        model.train_only(part)
        order = rng.stream(self.config.run.seed, "order", t, client)
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        tokens = seen = done = 0
        lengths = np.diff(rows.starts)
        model.model.train()
        model.check_views()
        with rng.torch_fork(self.config.run.seed, "train", t, client):
            while done < steps:
                for ids in data.batches(rows, section.batch_size, order)[: steps - done]:
                    count = rows.take(ids).target_tokens
                    model.gradient.zero_()
                    groups = model.forward.groups(rows, ids, limit)
                    lr = rate(section, (t - 1) * steps + done, self.config.run.rounds * steps)
                    for number, group in enumerate(groups, 1):
                        total += backward(rows, group, Pass(count, lr, number == len(groups)))
                    if section.clip_norm is not None:
                        clip(model.gradient, section.clip_norm)
                    optimizer.step(lr)
                    tokens, seen, done = tokens + count, seen + int(lengths[ids].sum()), done + 1
                    if self.on_step:
                        self.on_step(client, done, steps, tokens)
        model.check_views()
        if section.keep_optimizer or hosting.pooled(self.config):  # pooled rows are trained on as if without rounds
            self.moments.setdefault(client, {}).update(
                {kept + name: array for name, array in _on_host(optimizer.state(), moments).items()}
            )
        if self.sketches is not None:
            self.sketches[client] = spread.sketch(model, self.banks[model], self.trained[model])
        loss = float(total) / tokens
        self.seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss}; a lower train.lr or train.clip_norm may help")
        moved = {} if self.sketches is None or model.loaded is None else {"delta_norm": model.moved()}
        return {"loss": loss, "tokens": tokens, "steps": steps, "seen": seen, **moved}

    def descend(self, t, client, batches, backward, purpose):
        """A step on each of some batches with a loss that is not local training's; returns the mean of that loss.

        batches: a list. backward(batch) adds the gradient of its loss to that of the client's model and returns the
        loss, a number on the device. The optimiser is that of local training, begins anew and keeps nothing. purpose
        names the stream that dropout draws from.
        """
        import torch

        section, model, start = self.config.train, self.of(client), time.perf_counter()
        optimizer, total = self.optimizers[model][0], torch.zeros((), dtype=torch.float64, device=model.device)
        optimizer.reset()
        model.model.train()
        model.check_views()
        with rng.torch_fork(self.config.run.seed, purpose, t, client):
            for done, batch in enumerate(batches, (t - 1) * len(batches)):
                model.gradient.zero_()
                total += backward(batch)
                if section.clip_norm is not None:
                    clip(model.gradient, section.clip_norm)
                optimizer.step(rate(section, done, self.config.run.rounds * len(batches)))
                if self.on_step:
                    self.on_step(client, 0, 1, 0)  # no step of the bar's, but others may have failed
        model.check_views()
        loss = float(total) / len(batches)
        self.seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of {purpose} is {loss}; a lower train.lr or train.clip_norm may help")
        return loss


class Pass(NamedTuple):
    """What is known of a pass. count: target tokens of its step; lr: of the step; last: it is the step's last pass."""

    count: int
    lr: float
    last: bool


class Part:
    """A copy of a part of a model's vector with an optimiser of its own; copies of a part take turns in the model.

    section: of the configuration, train. place: slice of the vector. start: float32 array that it begins with.
    moments: {name: array} that its optimiser begins with, None for new ones. passes: for the caller to count.
    """

    def __init__(self, model, section, place, start, moments=None):
        import torch

        self.model, self.section, self.place, self.passes = model, section, place, 0
        self.vector = torch.from_numpy(np.array(start)).to(model.device)
        self.gradient = torch.zeros_like(self.vector)
        self.optimizer = OPTIMIZERS[section.optimizer](self.vector, self.gradient, section.weight_decay)
        if moments is not None:
            self.optimizer.restore(moments)

    @contextlib.contextmanager
    def inside(self):
        """Within this the model has the copy's values, and gradients are added to the copy's."""
        self.model.vector[self.place].copy_(self.vector)
        self.model.gradient[self.place].copy_(self.gradient)
        yield
        self.gradient.copy_(self.model.gradient[self.place])

    def step(self, lr):
        """Clip the gradient, make a step of it, and begin a new one."""
        if self.section.clip_norm is not None:
            clip(self.gradient, self.section.clip_norm)
        self.optimizer.step(lr)
        self.gradient.zero_()

    def values(self):
        """A copy of the values, float32 array."""
        return np.array(self.vector.cpu().numpy())

    def moments(self):
        """{name: array} of the optimiser, to begin another copy with."""
        return _on_host(self.optimizer.state(), {})


def _backward(model, rows, ids, step):
    """Add a pass's part of the gradient of a step's mean loss; returns the sum of the losses of its tokens."""
    import torch

    losses = model.forward.losses(rows, ids)
    (losses.sum() / step.count).backward()
    return losses.detach().sum(dtype=torch.float64)  # stays on the device: no step waits for it


def clip(gradient, limit):
    """Scale a flat gradient in place so that its norm is at most limit, without waiting for the device.

    The norm is accumulated in float64: a long float32 sum would depend on its order.
    """
    import torch

    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    gradient.mul_((limit / norm.clamp(min=limit)).float())


def rate(section, step, total):
    """The learning rate of a step, counted from 0 over all rounds of a client."""
    if step < section.warmup:
        return section.lr * (step + 1) / section.warmup
    if section.schedule == "constant":
        return section.lr
    done = (step - section.warmup) / max(1, total - section.warmup)
    return section.lr * ((1 - done) if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _on_host(tensors, arrays):
    """{name: array} of tensors, in the memory of arrays of the same names where there are such."""
    import torch

    arrays = {name: np.asarray(arrays.get(name, ())) for name in tensors}
    for name, tensor in tensors.items():
        if arrays[name].shape != tensor.shape:
            arrays[name] = torch.empty_like(tensor, device="cpu").numpy()
        torch.from_numpy(arrays[name]).copy_(tensor)
    return arrays


class SGD:
    """Plain gradient descent on the flat vector; weight decay as torch.optim.SGD has it, added to the gradient."""

    def __init__(self, vector, gradient, weight_decay):
        self.vector, self.gradient, self.weight_decay = vector, gradient, weight_decay

    def step(self, lr):
        if self.weight_decay:
            self.gradient.add_(self.vector, alpha=self.weight_decay)
        self.vector.add_(self.gradient, alpha=-lr)

    def state(self):
        return {}

    def reset(self):
        """Nothing is kept."""

    def restore(self, arrays):
        """Nothing is kept."""


class AdamW:
    """AdamW (arXiv 1711.05101) in torch's fused kernel, on the whole flat vector at once.

    torch.optim.AdamW gives the same bits; it would import torch's compiler, a second of CPU in every process.
    """

    def __init__(self, vector, gradient, weight_decay):
        import torch

        self.vector, self.gradient, self.weight_decay = vector, gradient, weight_decay
        self.first, self.second = torch.zeros_like(vector), torch.zeros_like(vector)
        self.count = torch.zeros((), dtype=torch.float32, device=vector.device)

    def step(self, lr):
        import torch

        self.count += 1
        torch._fused_adamw_(
            [self.vector],
            [self.gradient],
            [self.first],
            [self.second],
            [],
            [self.count],
            lr=lr,
            beta1=BETA1,
            beta2=BETA2,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )

    def state(self):
        return {"first": self.first, "second": self.second, "count": self.count}

    def reset(self):
        for tensor in self.state().values():
            tensor.zero_()

    def restore(self, arrays):
        _restore(self.state(), arrays)


class AdamW8bit:
    """AdamW with moments of 8 bits in blocks of 256 (arXiv 2110.02861), as bitsandbytes has it: a quarter of the size.

    On CUDA they are paged: where the GPU's memory runs out, they move to the host's (QLoRA, arXiv 2305.14314).
    """

    def __init__(self, vector, gradient, weight_decay):
        import bitsandbytes
        import torch

        make = bitsandbytes.optim.PagedAdamW8bit if vector.device.type == "cuda" else bitsandbytes.optim.AdamW8bit
        self.parameter, self.gradient = torch.nn.Parameter(vector), gradient  # the vector itself
        self.tool = make([self.parameter], 0.0, (BETA1, BETA2), EPSILON, weight_decay)
        self.count = torch.zeros((), dtype=torch.float32)
        self.parameter.grad = self.gradient
        if not self.tool.initialized:
            self.tool.check_overrides()
            self.tool.to_gpu()
            self.tool.initialized = True
        self.tool.init_state(self.tool.param_groups[0], self.parameter, 0, 0)
        self.fresh = {name: tensor.clone() for name, tensor in self.state().items()}

    def step(self, lr):
        self.count += 1
        self.tool.param_groups[0]["lr"] = lr
        self.tool.state[self.parameter]["step"] = int(self.count) - 1  # the tool adds one
        self.parameter.grad = self.gradient
        self.tool.step()

    def state(self):
        names = {"first": "state1", "second": "state2", "first_scale": "absmax1", "second_scale": "absmax2"}
        kept = self.tool.state[self.parameter]
        return {name: kept[own] for name, own in names.items()} | {"count": self.count}

    def reset(self):
        _restore(self.state(), self.fresh)

    def restore(self, arrays):
        _restore(self.state(), arrays)


OPTIMIZERS = {"adamw": AdamW, "adamw8bit": AdamW8bit, "sgd": SGD}


def _restore(tensors, arrays):
    import torch

    for name, tensor in tensors.items():
        tensor.copy_(torch.as_tensor(arrays[name]))


def peak_memory(device):
    """Most memory this process has held so far, in bytes: on its GPU if it has one, else resident in RAM."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counted(metrics, base_parameters, adapter_parameters):
    """Operations of a client's training by its metrics: those that the method counted itself, or of the whole model."""
    return metrics.get("flops", flops(base_parameters, adapter_parameters, metrics["seen"]))


def flops(base_parameters, adapter_parameters, tokens):
    """Floating-point operations of training on so many tokens: 4 a frozen and 6 a trained parameter and token.

    2 forward, 2 for the gradient of the activations, and 2 more for that of the weights where they are trained;
    attention's own products are left out, as is usual (Kaplan et al., arXiv 2001.08361).
    """
    return tokens * (4.0 * base_parameters + 6.0 * adapter_parameters)
