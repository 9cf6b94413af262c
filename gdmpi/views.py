"""A model's trainable parameters as views into one flat vector: what is trained, sent and hashed."""

import functools
import hashlib
import itertools
import math

import numpy as np

from gdmpi import flat, lowrank
from gdmpi.errors import UserError

PART = 1 << 20  # elements that leave a GPU at once: so many are read while the next are on their way
PEFT = "base_model.model."  # what peft puts before the names of a base's parameters
SAMPLED = 64  # values of each tensor of a base model that its fingerprint looks at


def peft_name(name):
    """A parameter's name as peft saves it: without the adapter's own name."""
    return name.replace(".default.", ".").removesuffix(".default")


class Trainable:
    """A model whose trainable parameters are views into one float32 vector, and their gradients into another.

    Loading, the delta, clipping and hashing are single operations on these vectors; nothing is copied tensor by
    tensor. trained: schema of the vector, names as peft saves them, in the model's order. schema: of what travels, as a
    Flat; the same here, and its vector too, but not where something else travels than what is trained (merged.py).

    parts: texts that names hold. What holds the first comes first in the vector, and so on, each a stretch that can be
    trained and sent by itself; what holds none comes last and is frozen. kept: what a method's clients on this rank
    know together.
    """

    def __init__(self, model, device, parts=("",)):
        import torch

        self.model, self.device, self.warnings, self.kept = model, device, [], None
        self.origins = {}  # {layer: its weight as it was loaded, where the base has changed}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("model.adapter: nothing is trainable")
        by_part = [[pair for pair in named if text in pair[0]] for text in parts]
        named = [*itertools.chain(*by_part), *(pair for pair in named if not any(text in pair[0] for text in parts))]
        self.parameters = [p for _, p in named]
        self.schema = self.trained = flat.Schema((peft_name(name), np.float32, p.shape) for name, p in named)
        size = self.trained.nbytes // 4
        self.vector = torch.empty(size, dtype=torch.float32, device=device)
        ends = [0, *itertools.accumulate(sum(p.numel() for _, p in own) for own in by_part)]
        self.parts, end = [slice(*pair) for pair in itertools.pairwise(ends)], ends[-1]
        self.gradient = torch.zeros(end, dtype=torch.float32, device=device)
        for p, start in zip(self.parameters, self.trained.blocks, strict=False):
            place = slice(int(start), int(start) + p.numel())
            self.vector[place] = p.detach().reshape(-1).to(torch.float32)
            p.data = self.vector[place].view(p.shape)
            p.grad = self.gradient[place].view(p.shape) if place.stop <= end else None
        self.travels, self.loaded = self.vector, None  # what leaves; what load() was last given
        self.host, self.copying = None, None  # where what leaves a GPU goes to, and the stream in which it does
        self.base_parameters = sum(count(p) for p in model.parameters() if not p.requires_grad)
        self.base_sha256 = fingerprint(model)
        self.whole = not hasattr(model, "peft_config")  # no adapter: the model itself is trained
        self.travelling = max(place.stop - place.start for place in self.parts)  # values that a client sends
        self.train_only(0)

    def train_only(self, k):
        """Let part k be trained, and nothing else."""
        place, self.active = self.parts[k], []
        for p, start in zip(self.parameters, self.trained.blocks, strict=False):
            p.requires_grad_(bool(place.start <= start < place.stop))
            self.active += [p] * p.requires_grad

    def load(self, values):
        """Set the trainable parameters to a Flat of this schema, or those of a part of it."""
        self.travels[self._place(values)].copy_(self._near(values))
        self.loaded = values

    def _near(self, values):
        """A Flat's vector, of torch, on the device where it lies there."""
        import torch

        return values.there() if values.there else torch.from_numpy(values.vector)

    def _place(self, values):
        """Where a Flat's values are in what travels; ValueError if they are another model's."""
        place = self.schema.place_of(values.schema)
        return slice(place.start // 4, place.stop // 4)

    def moved(self):
        """Norm of what the parameters that load() was last given have changed by since, in float64."""
        import torch

        start = self._near(self.loaded)
        parts = zip(self.vector[self._place(self.loaded)].split(PART), start.split(PART), strict=True)
        squares = [((part - other.to(self.device)).double() ** 2).sum() for part, other in parts]
        return math.sqrt(float(torch.stack(squares).sum()))

    def values(self):
        """A copy of what travels as a Flat, as it was loaded or trained."""
        result = flat.Flat(self.schema)
        result.vector[:] = self.travels.detach().cpu().numpy()
        return result

    def complete(self):
        """Bring what was learnt into what travels; nothing to do where that is what is trained."""

    def delta(self, start):
        """What travels minus start (a Flat of it, or of a part of it), as what leaves().

        It becomes its own difference, in the model's memory: what a full model has learnt takes no second copy.
        """
        self.complete()
        place = self._place(start)
        self.travels[place].sub_(self._near(start).to(self.device))
        return self._on_its_way(start.schema, place)

    def leaves(self):
        """What travels as a Flat that the caller may overwrite; only load() makes the model whole again.

        On the CPU it is the parameters' own memory. From a GPU they go to pinned memory part by part, while who reads
        the Flat works on the parts that are there.
        """
        self.complete()
        return self._on_its_way(self.schema, slice(0, len(self.travels)))

    def _on_its_way(self, schema, place):
        import torch

        travels = self.travels[place]
        if self.device.type == "cpu":
            return flat.Flat(schema, travels.numpy())
        if self.host is None:
            self.host = torch.empty(len(self.travels), dtype=torch.float32, pin_memory=True)
            self.copying = torch.cuda.Stream(self.device)
        self.copying.wait_stream(torch.cuda.current_stream(self.device))
        under_way = []
        with torch.cuda.stream(self.copying):
            for first in range(0, len(travels), PART):
                own = slice(first, min(first + PART, len(travels)))
                self.host[own].copy_(travels[own], non_blocking=True)
                under_way.append((4 * first, self.copying.record_event()))
        return flat.Flat(schema, self.host[: len(travels)].numpy(), functools.partial(_arrived, under_way))

    def put(self, values):
        """Set the model to what a run came to: an adapter's values, and what its base has gained, if it has."""
        gained = {name: array for name, array in values.items() if name.endswith(lowrank.DELTA)}
        if gained:
            self.rebase(None, gained)
            values = flat.pack({name: array for name, array in values.items() if name not in gained})
        if len(values):
            self.load(values)

    def rebase(self, t, message):
        """Add to the base what a round's message says (see lowrank.py); once, however often the message is loaded."""
        known, changes = self.kept or (-1, lowrank.nothing(self.schema))
        if known != t:
            self.kept = t, lowrank.follow(changes, message)
            for layer in lowrank.layers(self.schema.places) if len(message) else ():
                self._add_to_base(layer, changes[layer + lowrank.DELTA])

    def _add_to_base(self, layer, change):
        """Let a layer's weight be what it was when it was loaded, plus a change [outputs, inputs].

        In float32 that is a sum. Of fewer bits most of a change would be rounded away, so it stays beside them.
        """
        import torch

        inner = self.model.get_submodule(layer).get_base_layer()
        change = torch.from_numpy(change).to(self.device)
        if inner.weight.dtype != torch.float32:
            if not hasattr(inner, "beside"):
                inner.register_forward_hook(_beside)
            inner.beside = change.to(torch.bfloat16)
            return
        if layer not in self.origins:  # it may lie in a file that the ranks of a node share
            self.origins[layer] = inner.weight.data
            inner.weight.data = torch.empty_like(inner.weight.data)
        # GPT-2's Conv1D keeps [inputs, outputs]
        torch.add(self.origins[layer], change.T if type(inner).__name__ == "Conv1D" else change, out=inner.weight.data)

    def check_views(self):
        """Fail if a parameter or gradient no longer lies in the vectors (model.zero_grad() detaches them, say)."""
        if {id(p) for p in self.model.parameters() if p.requires_grad} != {id(p) for p in self.active}:
            raise RuntimeError("the model's trainable parameters are no longer those of the flat vector")
        for p, start in zip(self.parameters, self.trained.blocks, strict=False):
            offset = 4 * int(start)
            if start >= len(self.gradient):
                break
            if p.data_ptr() != self.vector.data_ptr() + offset:
                raise RuntimeError("a trainable parameter is no longer a view into the flat vector")
            if p.grad is None or p.grad.data_ptr() != self.gradient.data_ptr() + offset:
                raise RuntimeError("a gradient is no longer a view into the flat gradient")

    def adapter_config(self):
        """The text of peft's adapter_config.json for this adapter; of transformers' config.json for a whole model."""
        import json

        if self.whole:
            return self.model.config.to_json_string(use_diff=False)
        config = self.model.peft_config["default"].to_dict() | {"inference_mode": True}
        return json.dumps(
            config, indent=2, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)
        )


def _beside(layer, given, out):
    """A hook for a linear layer: what lies beside its weight adds to its output."""
    import torch

    return out + torch.nn.functional.linear(given[0], layer.beside.to(given[0].dtype)).to(out.dtype)


def _arrived(under_way, end):
    """Wait for those parts [(place of the first byte, event)] that begin before a place, and forget them."""
    while under_way and under_way[0][0] < end:
        under_way.pop(0)[1].synchronize()


def fingerprint(model):
    """A hash that tells base models apart without reading all of them: of names, shapes and some first values.

    Of weights in 4 bits only the name counts: devices may round them differently. To be taken before training, if the
    model has no adapter but is itself trained; it is then the same as with one.
    """
    import torch

    digest, whole = hashlib.sha256(), not hasattr(model, "peft_config")
    for name, p in model.named_parameters():
        if p.requires_grad and not whole:
            continue
        digest.update((PEFT * whole + name.replace(".base_layer", "")).encode())
        if p.dtype != torch.uint8 and p.device.type != "meta":
            first = p.detach().reshape(-1)[:SAMPLED].to("cpu", torch.float32)
            digest.update(f"{tuple(p.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def count(parameter):
    """Elements of a weight; one in 4 bits reports two elements a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(np.prod(shape)) if shape is not None else parameter.numel()
