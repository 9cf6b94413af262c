"""Knowledge distillation (arXiv 1503.02531): what a model answers to public rows, and steps that bring a model near it.

Answers are arrays by name, of one of two kinds:

    logits        [rows, labels] float32: public rows tried with every label; a label's is the log-likelihood of its
                  tokens, as a sum, so that softmax over the labels is how likely the model holds each
    ids, shares   [positions, k]: the k likeliest tokens before each target token, and their probabilities (float16) at
                  the temperature; what these leave to 1 is a tail, which is one more outcome and has no name

Nothing here learns from a public row's response: in the first kind it is not read, in the second its tokens are the
places that are looked at, each after those before it.
"""

import time

import numpy as np

from gdmpi import data, evaluate, rng

POSITIONS = {"cpu": 256, "cuda": 1024}  # whose logits exist at a time
NEVER = -1e30  # a logit of what cannot be


def spaced(public, count):
    """Public rows of which at most so many target tokens, spaced evenly over the row, remain targets."""
    target = np.zeros_like(public.target)
    for first, last in zip(public.starts[:-1], public.starts[1:], strict=True):
        places = first + np.flatnonzero(public.target[first:last])
        target[places[np.linspace(0, len(places) - 1, min(count, len(places))).astype(np.int64)]] = True
    return data.Rows(public.tokens, target, public.starts, public.index)


def nbytes(public, top_k, vocabulary):
    """Bytes of the answers to public rows."""
    if top_k is None:
        return 4 * len(public)
    return public.target_tokens * top_k * (_integers(vocabulary).itemsize + 2)


def _integers(vocabulary):
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def _units(public):
    """Positions of the rows that are answered together, arrays: a public row with every label, or one by itself."""
    return np.split(np.arange(len(public)), np.flatnonzero(np.diff(public.index)) + 1)


def _passes(public, units, numbers, limit):
    """Cut the numbers of units into lists of at most limit tokens, or of one unit."""
    lengths, passes, used = np.diff(public.starts), [[]], 0
    for number in numbers:
        size = int(lengths[units[number]].sum())
        if passes[-1] and used + size > limit:
            passes.append([])
            used = 0
        passes[-1].append(number)
        used += size
    return passes


# ---- answering -----------------------------------------------------------------------------------------------------


def respond(train, client, public, temperature, top_k=None, vocabulary=0):
    """{name: array}: what a client's model answers to public rows; logits without top_k, else tokens.

    train: a train.Trainer, whose time it is. vocabulary: how many tokens there are. All rows are answered in passes
    that depend on nothing else: the same bits wherever it is asked.
    """
    import torch

    model, start = train.of(client), time.perf_counter()
    model.model.eval()
    units, found = _units(public), []
    with torch.inference_mode():
        for part in _passes(public, units, range(len(units)), evaluate.TOKENS):
            rows = np.concatenate([units[number] for number in part])
            if top_k is None:
                found.append({"logits": _logits(model, public, rows, len(part)).float().cpu().numpy()})
            else:
                found.append(_likeliest(model, public, rows, temperature, top_k, vocabulary))
    train.seconds += time.perf_counter() - start
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def _logits(model, public, rows, count):
    """[count, labels], in float64: log-likelihoods of the labels, of the candidates of so many public rows."""
    import torch

    losses = model.forward.losses(public, rows).double().split(public.targets_of(rows))
    return -torch.stack([each.sum() for each in losses]).view(count, -1)


def _likeliest(model, public, rows, temperature, top_k, vocabulary):
    hidden, head = model.forward.states(public, rows)
    ids, shares = [], []
    for part in hidden.split(POSITIONS[hidden.device.type]):
        # another architecture may have more logits than there are tokens, or fewer to spare
        found = (head(part) / temperature).softmax(-1)[:, :vocabulary].topk(top_k)
        ids.append(found.indices.cpu().numpy().astype(_integers(vocabulary)))
        shares.append(found.values.cpu().numpy().astype(np.float16))
    return {"ids": np.concatenate(ids), "shares": np.concatenate(shares)}


# ---- averaging -----------------------------------------------------------------------------------------------------


def mean(received, top_k=None):
    """The weighted mean of answers: received is [(weight, {name: array})].

    Of logits it is the logits' mean. Of shares it is the mean of the probabilities, of which the top_k largest at each
    position remain; what a client did not list is in its tail, and stays there.
    """
    weights = np.array([weight for weight, _ in received], np.float64)
    if top_k is None:
        total = sum(weight * each["logits"].astype(np.float64) for weight, each in received)
        return {"logits": (total / weights.sum()).astype(np.float32)}
    ids = np.concatenate([each["ids"] for _, each in received], 1)
    shares = [each["shares"].astype(np.float64) * (weight / weights.sum()) for weight, each in received]
    order = np.argsort(ids, 1, kind="stable")
    ids, shares = (np.take_along_axis(array, order, 1) for array in (ids, np.concatenate(shares, 1)))
    # the same token of several clients lies side by side: all of it goes to the first
    new = np.concatenate([np.ones((len(ids), 1), bool), ids[:, 1:] != ids[:, :-1]], 1)
    first = np.maximum.accumulate(np.where(new, np.arange(ids.shape[1]), 0), 1)
    places = first + np.arange(len(ids))[:, None] * ids.shape[1]
    summed = np.bincount(places.ravel(), shares.ravel(), ids.size).reshape(ids.shape)
    largest = np.argsort(np.where(new, -summed, np.inf), 1, kind="stable")[:, :top_k]
    ids, shares = (np.take_along_axis(array, largest, 1) for array in (ids, summed))
    return {"ids": ids, "shares": shares.astype(np.float16)}


# ---- learning ------------------------------------------------------------------------------------------------------


def divergence(teacher, student, temperature):
    """KL(softmax(teacher / temperature) || softmax(student / temperature)) of each row of logits, [rows]."""
    import torch

    q, p = ((each / temperature).log_softmax(-1) for each in (teacher, student))
    return torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)


def tail_divergence(ids, shares, student, temperature):
    """KL(q || softmax(student / temperature)) of each position, [positions], the tail being one outcome.

    ids, shares [positions, k]: tokens and their q, brought down to a sum of 1 where rounding left it above. student:
    logits [positions, vocabulary]. If k is the vocabulary there is no tail, and it is the divergence of all tokens.
    """
    import torch

    p, sums = (student / temperature).log_softmax(-1), shares.sum(-1, keepdim=True)
    whole = ids.shape[-1] == student.shape[-1]
    q = shares / (sums if whole else sums.clamp(min=1))
    listed = (torch.xlogy(q, q) - q * p.gather(-1, ids)).sum(-1)
    if whole:
        return listed
    rest, tail = (1 - q.sum(-1)).clamp(min=0), p.scatter(-1, ids, NEVER).logsumexp(-1)
    return listed + torch.xlogy(rest, rest) - rest * tail


def steps(train, t, client, public, teacher, temperature, epochs, alpha=1.0):
    """Distil a teacher's answers to the public rows into the loaded model: (mean loss of the steps, tokens seen).

    train: a train.Trainer. teacher: {name: array}. A step takes train.batch_size public rows, in an order of its own in
    each of the epochs, and minimises

        (1 - alpha) CE + alpha tau^2 KL          tau: the temperature
                                                 CE: mean over the response tokens of as many rows of the client's own
                                                 KL: mean over the public rows, or over their positions

    client: whose rows, and whose model; with alpha 1 there need be no rows.
    """
    import torch

    seed, size, model = train.config.run.seed, train.config.train.batch_size, train.of(client)
    units, order = _units(public), rng.stream(seed, "distil", t, client)
    batches = [batch for _ in range(epochs) for batch in data.batches(units, size, order)]
    own = _own(train, t, client, len(batches)) if alpha < 1 else [None] * len(batches)
    answers = {name: torch.from_numpy(np.asarray(array).astype(KINDS[name])) for name, array in teacher.items()}
    # where the answers to each unit begin, and where the last ones end
    extent = [1] * len(units) if "logits" in answers else public.targets_of(range(len(public)))
    begins = np.cumsum([0, *extent])

    def backward(batch):
        numbers, ids = batch
        loss = torch.zeros((), dtype=torch.float64, device=model.device)
        for group in () if ids is None else model.forward.groups(train.rows[client], ids, train.limit):
            ce = model.forward.losses(train.rows[client], group).sum() / train.rows[client].take(ids).target_tokens
            ((1 - alpha) * ce).backward()
            loss += (1 - alpha) * ce.detach().double()
        weight = alpha * temperature**2 / sum(extent[number] for number in numbers)
        for part in _passes(public, units, numbers, train.limit):
            rows = np.concatenate([units[number] for number in part])
            places = np.concatenate([np.arange(begins[number], begins[number + 1]) for number in part])
            wanted = {name: array[places].to(model.device) for name, array in answers.items()}
            loss += _backward(model, public, rows, wanted, temperature, weight)
        return loss

    pairs = list(zip(batches, own, strict=True))
    seen = epochs * len(public.tokens) + sum(len(train.rows[client].take(ids).tokens) for ids in own if ids is not None)
    return train.descend(t, client, pairs, backward, "distil"), seen


def _own(train, t, client, count):
    """So many batches of a client's own rows, epoch after epoch."""
    order = rng.stream(train.config.run.seed, "distil own", t, client)
    size, batches = train.config.train.batch_size, []
    while len(batches) < count:
        batches += data.batches(train.rows[client], size, order)
    return batches[:count]


KINDS = {"logits": np.float64, "ids": np.int64, "shares": np.float32}  # what answers are computed with as


def _backward(model, public, rows, wanted, temperature, weight):
    """Add the gradient of weight times the sum of some rows' divergences; returns that sum, on the device."""
    if "logits" in wanted:
        student = _logits(model, public, rows, len(wanted["logits"]))
        loss = weight * divergence(wanted["logits"], student, temperature).sum()
        loss.backward()
        return loss.detach()
    hidden, head = model.forward.states(public, rows)
    leaf, total, size = hidden.detach().requires_grad_(), 0.0, POSITIONS[hidden.device.type]
    for ids, shares, part in zip(*(each.split(size) for each in (wanted["ids"], wanted["shares"], leaf)), strict=True):
        loss = weight * tail_divergence(ids, shares, head(part), temperature).sum()
        loss.backward()  # of a few positions at a time, down to their hidden states: no logits are kept
        total += loss.detach().double()
    hidden.backward(leaf.grad)
    return total
