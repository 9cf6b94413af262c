"""A causal language model cut after a block: either half runs by itself, and what crosses the cut becomes an array.

Both halves are the model that they are cut from. While one runs, stand-ins take the places of the blocks of the other:
they hand on what they are given, but for the one at the cut, where hidden states leave or come in. So positions, masks
and whatever else a model tells its blocks are made by the model itself, on both sides of the cut.
"""

import contextlib
import copy
import functools

import numpy as np

from gdmpi import flat, forward, views
from gdmpi.errors import UserError


def blocks_of(model, cut):
    """The list of a model's blocks; UserError if it is not known, or the cut does not lie between two of them."""
    import torch

    base = forward.unwrapped(model)
    count = base.config.get_text_config().num_hidden_layers
    lists = [m for m in base.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(f"method.name: the blocks of a {base.config.model_type} model cannot be found to cut it there")
    if cut >= count:
        say = f"say 1 to {count - 1}" if count > 1 else "it cannot be cut"
        raise UserError(f"method.cut: {cut}: the model has {count} blocks, and some must lie behind the cut; {say}")
    return lists[0]


def before(model, schema, cut):
    """The first arrays of a schema of what is trained in a model: those before the cut; UserError if a half has none.

    model: its weights may be on the meta device.
    """
    blocks = blocks_of(model, cut)
    front, back = ({id(p) for block in part for p in block.parameters()} for part in (blocks[:cut], blocks[cut:]))
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    count = next((number for number, p in enumerate(trained) if p in back), len(trained))
    if count == 0 or count == len(trained) or front & set(trained[count:]):
        what = "nothing is trained on one of its sides" if not front & set(trained[count:]) else "its blocks are shared"
        raise UserError(f"method.cut: {cut}: {what}; move it, or choose other model.adapter.targets")
    return flat.Schema(schema.entries[:count])


@functools.lru_cache(1)  # the clients of a rank share its model
def halved(trainable, cut, head=False):
    """The Halves of a model."""
    return Halves(trainable, cut, head)


class Halves:
    """A views.Trainable cut after so many blocks. UserError if it cannot be, which is found out by trying.

    head: whether head and loss, too, are with who has the first half. before: Schema of what is trained before the cut,
    the first arrays of the model's; place: slice of the flat vector with the rest.
    """

    def __init__(self, trainable, cut, head=False):
        self.trainable, self.forward, self.cut, self.head = trainable, trainable.forward, cut, head
        self.blocks = blocks_of(trainable.model, cut)
        self.before = before(trainable.model, trainable.trained, cut)
        self.place = slice(self.before.nbytes // 4, trainable.trained.nbytes // 4)
        self.tuples = False  # whether a block returns its hidden states as the first of several things
        if head and not self.forward.split:
            raise UserError("method.labels: this model's head cannot be run by itself at the clients; say server")
        self._try()

    def first(self, tokens, lengths):
        """Hidden states at the cut [sequences, tokens, width] of rows as forward.Forward.lay() has them."""
        crossing = []

        def leave(hidden):
            crossing.append(hidden)
            return hidden.detach()

        with self._without(range(self.cut, len(self.blocks)), self.cut, leave):
            self.forward.run(tokens, lengths)
        return crossing[0][:, : tokens.shape[1]]  # without what run() filled up

    def rest(self, hidden, lengths):
        """What Forward.run() gives, from the hidden states at the cut."""
        import torch

        def arrive(other):
            return torch.nn.functional.pad(hidden.to(other.dtype), (0, 0, 0, other.shape[1] - hidden.shape[1]))

        with self._without(range(self.cut), self.cut - 1, arrive):
            # token 0 stands for all: what becomes of it is not used
            return self.forward.run(torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device), lengths)

    def parameters(self):
        """(frozen, trained) parameters of who has the first half, with the head if he has that too."""
        base = self.forward.base
        modules = [base.get_input_embeddings(), *self.blocks[: self.cut], *[base.get_output_embeddings()] * self.head]
        frozen = {id(p): p for module in modules for p in module.parameters() if not p.requires_grad}
        return sum(views.count(p) for p in frozen.values()), self.before.nbytes // 4

    def to_array(self, tensor):
        """A tensor as an array to be sent, in the dtype of computing; bfloat16, which numpy lacks, as its bits."""
        import torch

        tensor = tensor.detach().to(self.forward.dtype).cpu().contiguous()
        return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()

    def to_tensor(self, array):
        """The tensor of an array that was sent, on the model's device."""
        import torch

        tensor = torch.from_numpy(np.array(array))
        return (tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor).to(self.trainable.device)

    @contextlib.contextmanager
    def _without(self, numbers, gate, through):
        """Within this, stand-ins for some blocks hand on what they are given, the one at the gate what through() makes.

        A block that is run again in the backward pass, with checkpointing, is the real one: it was there before.
        """
        real = {number: self.blocks[number] for number in numbers}
        try:
            for number, block in real.items():
                stand_in = copy.copy(block)  # a model may ask its blocks for what is noted there
                stand_in.forward = self._handing_on(through if number == gate else lambda hidden: hidden)
                self.blocks[number] = stand_in
            yield
        finally:
            for number, block in real.items():
                self.blocks[number] = block

    def _handing_on(self, through):
        def run(hidden, *args, **kwargs):
            hidden = through(hidden)
            return (hidden, None) if self.tuples else hidden

        return run

    def _try(self):
        """Compare the losses of a few rows through both halves with those of the whole."""
        import torch

        whole_model, rows = self.trainable.model, self.forward.probe()
        narrow = min(self.forward.dtype.itemsize, self.forward.base.get_input_embeddings().weight.dtype.itemsize) == 2
        was, near = whole_model.training, forward.ROUGH if narrow else forward.NEAR
        whole_model.eval()

        def look(block, inputs, output):
            self.tuples = isinstance(output, tuple)

        hook = self.blocks[0].register_forward_hook(look)
        try:
            with torch.inference_mode():
                whole = self.forward.losses(rows, range(len(rows)))
                tokens, lengths, places, targets = self.forward.lay(rows, range(len(rows)))
                apart = self.rest(self.first(tokens, lengths), lengths)
                apart = self.forward.losses_at(apart, places, targets)
            reason = None if torch.allclose(apart, whole, rtol=near, atol=near) else "the losses are other ones"
        except Exception as error:  # whatever a model makes of blocks that do nothing
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            hook.remove()
            whole_model.train(was)
        if reason:
            kind = self.forward.base.config.model_type
            raise UserError(f"method.name: halves of a {kind} model do not run by themselves ({reason})")
