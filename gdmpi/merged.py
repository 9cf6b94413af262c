"""An adapter is trained, and the whole model with it merged in travels: what a "full model update" can also mean.

    client i  W_i = W_t + s B_i A_i          the adapter begins each round as it began the first, with B = 0
    server    averages W_i, or what changed in it: mean(BA) itself, so that nothing is lost by averaging A and B apart

Unlike the adapter, the base changes from round to round, and is float32 in each rank's own memory.
"""

import math

import numpy as np

from gdmpi import flat, views


class Merged(views.Trainable):
    """A Trainable that loads and sends all weights of the base, while what is trained is the adapter on it.

    schema: names of the base's weights as transformers has them. base: their vector, of which they are views.
    """

    def __init__(self, adapted, device):
        import torch

        super().__init__(adapted, device)
        frozen = [(name, p) for name, p in adapted.named_parameters() if not p.requires_grad]
        self.schema = flat.Schema((_plain(name), np.float32, p.shape) for name, p in frozen)
        self.base = torch.empty(self.schema.nbytes // 4, dtype=torch.float32, device=device)
        for (_, p), start in zip(frozen, self.schema.blocks, strict=False):
            place = slice(int(start), int(start) + p.numel())
            self.base[place] = p.detach().reshape(-1).to(torch.float32)
            p.data = self.base[place].view(p.shape)
        self.travels, self.travelling = self.base, len(self.base)
        self.fresh = self.vector.clone()  # the adapter as it begins

    def load(self, values):
        """Set the base to a Flat of this schema, and the adapter to how it began."""
        super().load(values)
        self.vector.copy_(self.fresh)

    def complete(self):
        """Merge the adapter into the base."""
        import torch

        with torch.no_grad():
            for layer in self._layers():
                layer.get_base_layer().weight += layer.get_delta_weight("default")

    def moved(self):
        """Norm of what merging will change, in float64, from the factors' Gram matrices alone."""
        total = 0.0
        for layer in self._layers():
            a, b = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
            total += layer.scaling["default"] ** 2 * float(((b.t() @ b) * (a @ a.t())).sum())
        return math.sqrt(max(0.0, total))

    def adapter_config(self):
        """The text of the base's config.json: what comes out is a whole model."""
        return self.model.get_base_model().config.to_json_string(use_diff=False)

    def _layers(self):
        return [layer for layer in self.model.modules() if hasattr(layer, "lora_A") and "default" in layer.lora_A]


def _plain(name):
    return name.removeprefix(views.PEFT).replace(".base_layer", "")
