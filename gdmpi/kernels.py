"""What a step of training spends its time in, as autograd functions: linear layers with LoRA, attention, head and loss.

Each computes in one dtype, keeps for the backward pass no more than it needs, and makes nothing of the size
tokens x vocabulary. The frozen weights may be 4-bit or of another dtype: they are made ready where they are used, once
in the forward and once in the backward pass, and not kept.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from gdmpi.estimate import BLOCK, CHUNK, TILE

# oneDNN, which multiplies in 16 bits on the CPU, makes a kernel for each shape that it meets: rounded up they are few
SHORT = {2: TILE}  # by the bytes of an element: tokens up to which rows attend together
LEAST = 16  # tokens that short rows are made at least
FILLED = {2: 16}  # by the bytes of an element: what numbers of targets are rounded up to
KEPT = 1024  # keys of a tile up to which its shares are kept for the backward pass rather than made again


class LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scale (d A') B', and its gradients in x, d, A and B.

    x, d: [..., inputs]; d is x after dropout, or None where there is none. weight: a function that returns W [outputs,
    inputs] in a dtype. A: [r, inputs], B: [outputs, r], float32. The result is in dtype.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scale, dtype):
        """The product, with what the backward pass needs kept in ctx."""
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        branch = flat if dropped is None else dropped.reshape(flat.shape).to(dtype)
        a, b = a.to(dtype), (b * scale).to(dtype)
        narrow = branch @ a.t()
        y = flat @ weight(dtype).t()
        if bias is not None:
            y += bias
        y.addmm_(narrow, b.t())
        ctx.weight, ctx.scale, ctx.dropped = weight, scale, dropped is not None
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, None if dropped is None else dropped.dtype)
        ctx.save_for_backward(branch, narrow, a, b)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        """Gradients of x, d, A and B."""
        branch, narrow, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1]).to(branch.dtype)
        dnarrow = dy @ b
        dx = ddropped = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weight(branch.dtype)
            if not ctx.dropped:
                dx.addmm_(dnarrow, a)
            dx = dx.view(ctx.shape).to(ctx.dtypes[0])
        if ctx.dropped and ctx.needs_input_grad[1]:
            ddropped = (dnarrow @ a).view(ctx.shape).to(ctx.dtypes[1])
        da, db = (dnarrow.t() @ branch).float(), (dy.t() @ narrow).float().mul_(ctx.scale)
        return dx, ddropped, None, None, da, db, None, None


class HeadLoss(torch.autograd.Function):
    """Negative log-likelihoods of target tokens, float32, and whether no other token was likelier; from hidden states.

    hidden: [targets, width]; weight: the head's [vocabulary, width], in the same dtype; targets: token ids. The
    gradient is formed along with the loss, a chunk of targets at a time, so that their logits need not be kept or made
    twice: the chunk's logits become exp(logit - largest) in place, and are divided by their sum only when they have
    been reduced to a gradient. This is done by blocks that stay in the processor's cache. A head that is trained gets
    its gradient in the same way, for which all losses must count alike in what is differentiated.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        """The losses and hits, and the gradient in ctx."""
        count, chunk = len(targets), CHUNK[hidden.device.type]
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        hits = torch.empty(count, dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        trained = [
            torch.zeros_like(each, dtype=torch.float32) if each is not None and needed else None
            for each, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        ]
        fill = -count % FILLED.get(hidden.dtype.itemsize, 1) if hidden.device.type == "cpu" else 0
        filled = torch.nn.functional.pad(hidden, (0, 0, 0, fill)) if fill else hidden
        logits = hidden.new_empty(min(chunk, len(filled)), len(weight))
        for first in range(0, count, chunk):
            here = slice(first, min(first + chunk, count))
            whole = torch.mm(filled[first : first + chunk], weight.t(), out=logits[: len(filled) - first])
            part = whole[: here.stop - first]
            if bias is not None:
                part += bias
            wanted = targets[here]
            losses[here] = -part.gather(1, wanted[:, None])[:, 0].float()
            totals, block_size = [], BLOCK[hidden.device.type]
            by_block = (each.split(block_size) for each in (part, losses[here], hits[here]))
            for block, loss, hit in zip(*by_block, strict=True):
                largest = block.amax(-1, keepdim=True).float()
                torch.ge(-loss, largest[:, 0], out=hit)
                shares = torch.sub(block, largest).exp_()  # in float32, whatever the logits are in
                totals.append(shares.sum(-1, keepdim=True))
                block.copy_(shares)
                loss += (totals[-1].log() + largest)[:, 0]
            if gradient is not None:
                gradient[here] = torch.mm(whole, weight)[: len(part)] / torch.cat(totals) - weight[wanted]
            if trained[0] is not None:
                trained[0] += torch.mm(part.t(), (hidden[here] / torch.cat(totals)).to(part.dtype))
                trained[0].index_add_(0, wanted, hidden[here].float(), alpha=-1)
            if trained[1] is not None:
                trained[1] += (part / torch.cat(totals)).sum(0)
                trained[1].index_add_(0, wanted, torch.ones_like(losses[here]), alpha=-1)
        ctx.save_for_backward(gradient, *trained)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx, dlosses, _):
        """The gradient that was formed with the losses."""
        gradient, *trained = ctx.saved_tensors
        if trained[0] is not None or trained[1] is not None:
            torch._assert_async((dlosses == dlosses[:1]).all())
        return (
            None if gradient is None else gradient * dlosses[:, None].to(gradient.dtype),
            *(None if each is None else (each * dlosses[0]).to(dlosses.dtype) for each in trained),
            None,
        )


class RowAttention(torch.autograd.Function):
    """Causal attention of packed rows, each within itself; for the CPU.

    In 16 bits short rows are taken together with others about as long; other rows by tiles of queries.

    q, k, v: [heads, tokens, width], in one dtype, q scaled; lengths: of the rows, a tuple; window: how many tokens a
    query sees at most, itself included, or None. In bfloat16 torch's own kernel for the CPU takes twice as long.
    """

    @staticmethod
    def forward(ctx, q, k, v, lengths, window):
        """The attention's output."""
        out, kept, short = torch.empty_like(v), [], SHORT.get(q.dtype.itemsize, 0)
        for block in _blocks(lengths, short):
            queries, keys, values = (block.of(each) for each in (q, k, v))
            shares = _shares(queries, keys, 0, window)
            shares.unflatten(0, (len(q), -1)).masked_fill_(block.behind, 0)
            kept.append(shares)
            block.put(torch.bmm(shares, values), out)
        for queries, keys in _tiles(lengths, window, short):
            shares = _shares(q[:, queries], k[:, keys], queries.start - keys.start, window)
            torch.bmm(shares, v[:, keys], out=out[:, queries])
            kept.append(shares if any(ctx.needs_input_grad) and keys.stop - keys.start <= KEPT else None)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.how = lengths, window, short
        return out

    @staticmethod
    def backward(ctx, dout):
        """Gradients of q, k and v."""
        q, k, v, out, *kept = ctx.saved_tensors
        lengths, window, short = ctx.how
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner, kept = (dout * out).sum(-1, keepdim=True), iter(kept)
        for block in _blocks(lengths, short):
            shares, douts = next(kept), block.of(dout)
            dscores = torch.bmm(douts, block.of(v).transpose(1, 2)).sub_(block.of(inner)).mul_(shares)
            block.put(torch.bmm(dscores, block.of(k)), dq)
            block.put(torch.bmm(dscores.transpose(1, 2), block.of(q)), dk)
            block.put(torch.bmm(shares.transpose(1, 2), douts), dv)
        for queries, keys in _tiles(lengths, window, short):
            if (shares := next(kept)) is None:
                shares = _shares(q[:, queries], k[:, keys], queries.start - keys.start, window)
            dscores = torch.bmm(dout[:, queries], v[:, keys].transpose(1, 2)).sub_(inner[:, queries]).mul_(shares)
            torch.bmm(dscores, k[:, keys], out=dq[:, queries])
            dk[:, keys].baddbmm_(dscores.transpose(1, 2), q[:, queries])
            dv[:, keys].baddbmm_(shares.transpose(1, 2), dout[:, queries])
        return dq, dk, dv, None, None


class Block(NamedTuple):
    """Short rows side by side, as long as a power of two; the last ones may be of nothing.

    tokens: [rows, length] where in the packed rows each is found; behind a row's end it is its first token again, which
    no query of the row sees, and whose own shares are to be zeros. mine: [tokens that are rows' own] among them.
    behind: [rows, length, 1], whether they lie behind a row's end.
    """

    tokens: torch.Tensor
    mine: torch.Tensor
    behind: torch.Tensor

    def of(self, packed):
        """The rows of [heads, tokens, width]: [heads * rows, length, width]."""
        return packed[:, self.tokens].flatten(0, 1)

    def put(self, rows, packed):
        """Write what of() gives back to where it is from."""
        own = rows.view(len(packed), -1, rows.shape[-1])[:, self.mine]
        packed[:, self.tokens.flatten()[self.mine]] = own


@functools.lru_cache(maxsize=8)
def _blocks(lengths, short):
    """Blocks of the packed rows of at most so many tokens, each of rows up to the same power of two."""
    ends, found = np.cumsum(lengths), {}
    for length, end in zip(lengths, ends, strict=True):
        if length <= short:
            found.setdefault(max(LEAST, 1 << (length - 1).bit_length()), []).append((end - length, length))
    blocks = []
    for size, rows in found.items():
        rows += [(0, 0)] * (-len(rows) % (4 if len(rows) > 2 else 1))
        starts, sizes = np.array(rows).T[:, :, None]
        within = np.arange(size)
        own = within < sizes
        tokens = np.where(own, starts + within, starts)
        blocks.append(Block(*map(torch.from_numpy, (tokens, np.flatnonzero(own), ~own[:, :, None]))))
    return blocks


def _tiles(lengths, window, short):
    """(queries, keys) of the packed rows that are longer, as slices: a tile of queries and all keys that it sees."""
    start = 0
    for length in lengths:
        for first in range(start, start + length, TILE) if length > short else ():
            lowest = start if window is None else max(start, first - window + 1)
            last = min(first + TILE, start + length)
            yield slice(first, last), slice(lowest, last)
        start += length


def _shares(queries, keys, below, window):
    """How much each query attends to each key, [heads, queries, keys]; below: keys before the first query."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    count = queries.shape[1]
    scores[:, :, below:] += torch.full((count, count), -torch.inf, dtype=scores.dtype).triu_(1)
    if window is not None and below + count > window:
        past = torch.ones(scores.shape[1:], dtype=torch.bool).tril_(below - window)
        scores.masked_fill_(past, -torch.inf)
    return scores.softmax(-1)


def row_attention(q, k, v, lengths, scale, dtype, window=None, dropout=0.0):
    """Causal attention of packed rows, each within itself: [1, tokens, heads, width], computed in dtype.

    q: [1, heads, tokens, width]; k, v: the same, maybe with fewer heads. lengths: of the rows. scale: of the scores.
    window: how many tokens a query sees at most, itself included, or None. dropout: of the attention's shares.
    """
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and not dropout:
        q, k, v = ((q * scale).to(dtype), k.to(dtype), v.to(dtype))
        k, v = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (k, v))
        return RowAttention.apply(q[0], k[0], v[0], tuple(lengths), window).transpose(0, 1)[None]
    outs, parts = [], (each.to(dtype).split(lengths, 2) for each in (q, k, v))
    for length, *row in zip(lengths, *parts, strict=True):
        how = {"is_causal": True}
        if window is not None and window < length:
            how = {"attn_mask": torch.ones(length, length, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)}
        outs.append(scaled_dot_product_attention(*row, dropout_p=dropout, scale=scale, enable_gqa=groups > 1, **how))
    return torch.cat(outs, 2).transpose(1, 2)
