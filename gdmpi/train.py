"""Local training: batches, loss on response tokens, clipping and the optimiser, all on the flat vectors."""

import math
import resource
import time

import numpy as np

from gdmpi import data, rng

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW's, as everywhere


class Trainer:
    """Trains any client of this rank on its rows, in the one model that they share.

    rows: {client: data.Rows}. moments: what an optimiser keeps, {client: {name: array}}, only with keep_optimizer.
    """

    def __init__(self, model, config, rows):
        self.model, self.config, self.rows, self.moments = model, config, rows, {}
        self.on_step = None  # called with (client, steps done, steps of the round, target tokens so far)
        self.seconds = 0.0  # spent in local training since the last round

    def __call__(self, t, client):
        """Run round t's local steps of a client from where the model stands; returns metrics.

        loss: mean over the target tokens trained on. tokens: target tokens. steps. seen: tokens passed through.
        """
        import torch

        section, rows, model = self.config.train, self.rows[client], self.model
        start = time.perf_counter()
        steps = self.steps_of(client)
        optimizer = {"adamw": AdamW, "sgd": SGD}[section.optimizer](model, section.weight_decay)
        if client in self.moments:
            optimizer.restore(self.moments[client])
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
                    for group in model.forward.groups(rows, ids, section.pass_tokens):
                        losses = model.forward.losses(rows, group)
                        (losses.sum() / count).backward()
                        total += losses.detach().sum(dtype=torch.float64)  # stays on the device: no step waits for it
                    if section.clip_norm is not None:
                        clip(model.gradient, section.clip_norm)
                    optimizer.step(rate(section, (t - 1) * steps + done, self.config.run.rounds * steps))
                    tokens, seen, done = tokens + count, seen + int(lengths[ids].sum()), done + 1
                    if self.on_step:
                        self.on_step(client, done, steps, tokens)
        model.check_views()
        if section.keep_optimizer:
            self.moments[client] = optimizer.state()
        loss = float(total) / tokens
        self.seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss}; a lower train.lr or train.clip_norm may help")
        return {"loss": loss, "tokens": tokens, "steps": steps, "seen": seen}

    def steps_of(self, client):
        """Optimiser steps of a client in a round."""
        section = self.config.train
        return section.steps or section.epochs * math.ceil(len(self.rows[client]) / section.batch_size)


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


class SGD:
    """Plain gradient descent on the flat vector; weight decay as torch.optim.SGD has it, added to the gradient."""

    def __init__(self, model, weight_decay):
        self.vector, self.gradient, self.weight_decay = model.vector, model.gradient, weight_decay

    def step(self, lr):
        if self.weight_decay:
            self.gradient.add_(self.vector, alpha=self.weight_decay)
        self.vector.add_(self.gradient, alpha=-lr)

    def state(self):
        return {}

    def restore(self, arrays):
        """Nothing is kept."""


class AdamW:
    """AdamW (arXiv 1711.05101) in torch's fused kernel, on the whole flat vector at once.

    torch.optim.AdamW gives the same bits; it would import torch's compiler, a second of CPU in every process.
    """

    def __init__(self, model, weight_decay):
        import torch

        self.vector, self.gradient, self.weight_decay = model.vector, model.gradient, weight_decay
        self.first, self.second = torch.zeros_like(model.vector), torch.zeros_like(model.vector)
        self.count = torch.zeros((), dtype=torch.float32, device=model.device)

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
        return {
            "first": self.first.cpu().numpy(),
            "second": self.second.cpu().numpy(),
            "count": self.count.cpu().numpy(),
        }

    def restore(self, arrays):
        import torch

        for name in ("first", "second", "count"):
            getattr(self, name).copy_(torch.from_numpy(np.array(arrays[name])))


def peak_memory(device):
    """Most memory this process has held so far, in bytes: on its GPU if it has one, else resident in RAM."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops(base_parameters, adapter_parameters, tokens):
    """Floating-point operations of training on so many tokens: 4 a frozen and 6 a trained parameter and token.

    2 forward, 2 for the gradient of the activations, and 2 more for that of the weights where they are trained;
    attention's own products are left out, as is usual (Kaplan et al., arXiv 2001.08361).
    """
    return tokens * (4.0 * base_parameters + 6.0 * adapter_parameters)
