"""The forward pass of rows: from token ids to the loss of each target token, without padding and without logits.

The rows of a pass lie one behind the other in one sequence. Positions restart with each row and attention stays within
it, so that a row's losses do not depend on its neighbours. The head and the loss are computed for target tokens only.
A model that cannot be run so, which is found out by trying, gets its rows padded, with others of like length.
"""

import contextlib
import contextvars
import functools
import types

import numpy as np

from gdmpi import data
from gdmpi.errors import UserError, first_line

NAME, ROWS = "gdmpi", "gdmpi_rows"  # of the attention, in transformers' table, and of its argument
ROUND = 64  # tokens of a pass in 16 bits on the CPU are a multiple of it
ELSE = "sdpa"  # the attention for all other calls of the model
UNLIKE = 1.25  # times the length of the shortest row of a padded pass; longer ones go into another
PROBE = (7, 3, 5)  # lengths of the rows that a model is tried on
NEAR, ROUGH = 1e-4, 3e-2  # what rounding may change in a loss, absolute and relative, in 32 and in 16 bits


def unwrapped(model):
    """transformers' model, which may have peft's around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Forward:
    """Computes losses of rows with a model. model: peft's or transformers'. dtype: name of what is computed in.

    packed: whether rows are packed. split: whether head and loss are apart from the rest, for target tokens only.
    notes: what could not be had, and what is done instead, as lines.
    """

    def __init__(self, model, device, dtype="float32", packing=True, compiled=False):
        import torch

        self.model, self.device, self.notes = model, device, []
        self.base = unwrapped(model)
        self.packed = self.split = self.autocast = False
        was = model.training
        model.eval()
        plain = self._try()
        self.split = self._head_is_apart()
        if not self.split:
            self.notes.append("the head cannot be split off this model: logits of all tokens of a pass are made")
        if packing:
            self._pack(plain)
        model.train(was)
        if compiled:
            self._compile()
        self.dtype = getattr(torch, dtype)
        self.autocast = self.dtype.itemsize == 2  # torch casts what the kernels here do not
        _put_kernels(self.base, self.dtype)

    def checkpoint(self):
        """Have layers keep only their input and run again in the backward pass; UserError if they cannot."""
        try:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"train.checkpointing: not with this model ({first_line(error)})") from None

    def groups(self, rows, ids, limit=None):
        """Cut row ids into passes of at most limit tokens, padding included, or of one row: lists of ids."""
        lengths = {i: int(rows.starts[i + 1] - rows.starts[i]) for i in ids}
        order = list(ids) if self.packed else sorted(ids, key=lambda i: lengths[i])
        groups = []
        for i in order:
            group = groups[-1] if groups else []
            tokens = sum(lengths[j] for j in group) if self.packed else len(group) * lengths[i]
            full = limit is not None and tokens + lengths[i] > limit
            unlike = not self.packed and group and lengths[i] > UNLIKE * lengths[group[0]]
            if not group or full or unlike:
                groups.append([])
            groups[-1].append(i)
        return groups

    def losses(self, rows, ids):
        """Negative log-likelihoods of the rows' target tokens, float32, row after row."""
        tokens, lengths, places, targets = self.lay(rows, ids)
        return self.losses_at(self.run(tokens, lengths), places, targets)

    def scores(self, rows, ids):
        """The rows' losses() and, token by token, whether no other token was likelier than the target."""
        tokens, lengths, places, targets = self.lay(rows, ids)
        hidden = self.run(tokens, lengths).flatten(0, 1)[places]
        if self.split:
            return self._head(hidden, targets)
        return _cross_entropy(hidden, targets), hidden.gather(1, targets[:, None])[:, 0] >= hidden.amax(-1)

    def states(self, rows, ids):
        """What the rows' target tokens are told from, [targets, width], and a function from that to logits, float32."""
        tokens, lengths, places, _ = self.lay(rows, ids)
        hidden = self.run(tokens, lengths).flatten(0, 1)[places]
        return hidden, self._logits if self.split else lambda logits: logits.float()

    def lay(self, rows, ids):
        """Rows as a pass has them: (token ids [sequences, tokens], lengths of rows, places before targets, targets).

        Packed they are one sequence, else one each with zeros at its right. Places count through all sequences.
        """
        import torch

        if self.packed:
            rows = rows.take(ids)
            tokens, target = rows.tokens.astype(np.int64)[None], rows.target[None]
            lengths = np.diff(rows.starts).tolist()
        else:
            tokens, attention, target = data.pad(rows, ids)
            lengths = attention.sum(1).tolist()
        places = np.flatnonzero(target)
        numbers = (tokens, places - 1, tokens.reshape(-1)[places])
        tokens, places, targets = (torch.from_numpy(array).to(self.device) for array in numbers)
        return tokens, lengths, places, targets

    def run(self, tokens, lengths):
        """Hidden states, or logits if the head is not split off, of rows as lay() has them: [sequences, tokens, _]."""
        import torch

        with torch.autocast(self.device.type, self.dtype) if self.autocast else contextlib.nullcontext():
            return (self._packed if self.packed else self._padded)(tokens, lengths)

    def losses_at(self, out, places, targets):
        """Negative log-likelihoods of targets, float32, from what run() gave, at the places before them."""
        out = out.flatten(0, 1)[places]
        return self._head(out, targets)[0] if self.split else _cross_entropy(out, targets)

    def _head(self, hidden, targets):
        from gdmpi import kernels

        weight, bias, dtype = self._weights()
        return kernels.HeadLoss.apply(hidden.to(dtype), weight, bias, targets)

    def _logits(self, hidden):
        import torch

        weight, bias, dtype = self._weights()
        return torch.nn.functional.linear(hidden.to(dtype), weight, bias).float()

    def _weights(self):
        """(weight, bias or None, dtype) of the head, in what is computed in."""
        head = self.base.get_output_embeddings()
        dtype = self.dtype if self.autocast else head.weight.dtype
        return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), dtype

    def _packed(self, tokens, lengths):
        """What the model makes of rows in one sequence."""
        import torch

        count = tokens.shape[1]
        if fill := -count % ROUND if self.autocast and self.device.type == "cpu" else 0:
            # a row more, of nothing: oneDNN makes a kernel for each shape that it meets, slower than it runs
            tokens, lengths = torch.nn.functional.pad(tokens, (0, fill)), [*lengths, fill]
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(self.device)
        # a model hands on what it does not know down to its attention, also when checkpointing repeats a layer
        rows = {ROWS: types.SimpleNamespace(lengths=lengths, dtype=self.dtype if self.autocast else None)}
        with _no_masks():
            return self._run(input_ids=tokens, position_ids=positions[None], **rows)[:, :count]

    def _padded(self, tokens, lengths):
        """What it makes of rows side by side."""
        import torch

        attention = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
        return self._run(input_ids=tokens, attention_mask=torch.from_numpy(attention.astype(np.int64)).to(self.device))

    def _run(self, **inputs):
        if self.split:
            return self.base.base_model(use_cache=False, **inputs).last_hidden_state
        return self.model(use_cache=False, **inputs).logits

    # ---- finding out what a model takes -------------------------------------------------------------------------

    def probe(self, swapped=False):
        """A few short rows of made-up tokens to try the model on, the first row another one if swapped."""
        draw, vocabulary = np.random.default_rng(0), self.base.get_input_embeddings().weight.shape[0]
        tokens, starts = draw.integers(0, vocabulary, sum(PROBE)), np.cumsum([0, *PROBE])
        if swapped:
            tokens[: PROBE[0]] = draw.integers(0, vocabulary, PROBE[0])
        return data.Rows(tokens, ~np.isin(np.arange(sum(PROBE)), starts), starts, np.arange(len(PROBE)))

    def _try(self, swapped=False):
        """Losses of the rows of probe()."""
        import torch

        with torch.inference_mode():
            return self.losses(self.probe(swapped), range(len(PROBE)))

    def _head_is_apart(self):
        """Whether the logits are the output layer of the last hidden states, and nothing is done to either.

        Tried with hidden states that are so large that a scale or a soft cap would show.
        """
        import torch

        head, inner = self.base.get_output_embeddings(), self.base.base_model
        # a layer that is more than linear, such as one with an adapter on it, is not
        if type(head) is not torch.nn.Linear or inner is self.base:
            return False
        draw = np.random.default_rng(1).standard_normal((1, 2, head.in_features))
        hidden = torch.from_numpy(30 * draw).to(self.device, head.weight.dtype)

        def replace(module, inputs, output):
            output.last_hidden_state = hidden
            return output

        hook = inner.register_forward_hook(replace)
        try:
            with torch.inference_mode():
                ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
                logits = self.base(input_ids=ids, use_cache=False).logits
                return torch.equal(logits.float(), head(hidden).float())
        except (AttributeError, TypeError):
            return False  # its output has no last hidden state
        finally:
            hook.remove()

    def _pack(self, plain):
        """Pack from now on, if the losses of a few rows are then those that the model as it is gives."""
        import torch

        near = NEAR if self.base.get_input_embeddings().weight.dtype.itemsize > 2 else ROUGH
        if self.base.config._attn_implementation != ELSE:
            reason = f"its attention is {self.base.config._attn_implementation}"
        else:
            self.packed = True
            self._attend(NAME)
            try:
                packed, swapped = self._try(), self._try(swapped=True)
                others = PROBE[0] - 1  # targets of the first row
                if not torch.equal(packed[others:], swapped[others:]):
                    reason = "its rows are not kept apart"
                elif not torch.allclose(packed, plain, rtol=near, atol=near):
                    reason = f"losses differ by {float((packed - plain).abs().max()):.2g}"
                else:
                    return
            except Exception as error:  # whatever a model makes of an attention that it does not know
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.packed = False
            self._attend(ELSE)
        self.notes.append(f"rows cannot be packed with this model ({reason}): they are padded, like lengths together")

    def _compile(self):
        """Have torch.compile make the model's layers quicker, all but the attention, whose rows differ in each pass."""
        import torch
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, torch.compiler.disable(_attention))
        inner = self.base.base_model
        inner.compile(dynamic=True)
        try:
            self._try()
        except Exception as error:  # no C++ compiler, as a rule
            inner._compiled_call_impl = None
            self.notes.append(f"train.compile: torch cannot compile here ({first_line(error)}): it runs uncompiled")

    def _attend(self, name):
        """Have the model use an attention of transformers' table, where ours is entered."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        for config in {id(c): c for c in (self.base.config, self.base.config.get_text_config())}.values():
            config._attn_implementation = name


def _cross_entropy(logits, targets):
    import torch

    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


_masks = contextvars.ContextVar("whether masks are made", default=True)


@contextlib.contextmanager
def _no_masks():
    """Within this, models make no attention masks: rows in one sequence are told apart by their lengths."""
    token = _masks.set(False)
    try:
        yield
    finally:
        _masks.reset(token)


def _mask(*args, **kwargs):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[ELSE](*args, **kwargs) if _masks.get() else None


def _attention(module, q, k, v, mask, dropout=0.0, scaling=None, **more):
    """Attention as transformers' models call it, (output [1, tokens, heads, width], None); theirs without our rows."""
    from gdmpi import kernels

    if ROWS not in more:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[ELSE](module, q, k, v, mask, dropout=dropout, scaling=scaling, **more)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"its attention has {', '.join(unknown) or 'sight of what follows'}")
    rows = more[ROWS]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return kernels.row_attention(
        q, k, v, rows.lengths, scale, rows.dtype or q.dtype, more.get("sliding_window"), dropout
    ), None


def _put_kernels(model, dtype):
    """Have peft's LoRA layers that are plain run as kernels.LoraLinear."""
    for layer in model.modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A and not getattr(layer, "lora_variant", None):
            weight = _weight_of(layer.base_layer)
            if weight is not None:
                layer.forward = functools.partial(_lora, layer, layer.forward, weight, dtype)


def _weight_of(layer):
    """A function that returns a linear layer's weight [outputs, inputs] in a dtype, or None if it is not known how."""
    import torch

    def nf4(dtype):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)

    if type(layer).__name__ == "Linear4bit":
        return nf4
    if type(layer) is torch.nn.Linear:
        return lambda dtype: layer.weight.detach().to(dtype)
    if type(layer).__name__ == "Conv1D":  # GPT-2's, which has its weight the other way round
        return lambda dtype: layer.weight.detach().t().to(dtype)
    return None


def _lora(layer, as_it_was, weight, dtype, x, *args, **kwargs):
    import torch

    from gdmpi import kernels

    if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]:
        return as_it_was(x, *args, **kwargs)
    drop = layer.lora_dropout["default"]
    dropped = drop(x) if getattr(drop, "p", 0) and layer.training else None
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base, scale = layer.base_layer, layer.scaling["default"]
    y = kernels.LoraLinear.apply(x, dropped, weight, base.bias, a, b, scale, dtype)
    if hasattr(base, "beside"):
        y = y + torch.nn.functional.linear(x.to(dtype), base.beside.to(dtype))
    # where torch casts, the next layer does not mind; who calls the model by himself wants what a layer gives as a rule
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
