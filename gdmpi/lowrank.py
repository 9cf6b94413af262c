"""Sums of low-rank products, for methods that change the base: the same bits on every rank, whatever multiplies there.

A client's B_i A_i add up over clients as one product of stacked factors, [B_1 .. B_K] [p_1 A_1; ..; p_K A_K] (FLoRA,
arXiv 2409.05976). The factors travel, and every rank adds the product to the base by itself; the server does, too, for
a resume. Their sums must not depend on who multiplies, so the stacked factors are rounded to a grid: fine enough to be
below what float32 rounds away of the largest, coarse enough for float64 to hold each sum of products exactly.

A message holds the stacks of the last round, NAME.stack for each NAME of A and B, or, when a start begins, all that has
been added, LAYER.delta.
"""

import math

import numpy as np

from gdmpi import flat

A, B = ".lora_A.weight", ".lora_B.weight"
STACK, DELTA = ".stack", ".delta"


def layers(names):
    """The names of the LoRA layers among the names of weights, in order."""
    return [name.removesuffix(A) for name in names if name.endswith(A)]


def grid(array, bits):
    """The array rounded to multiples of a power of two, of which its largest element is less than 2**bits; float32."""
    array = np.asarray(array, np.float64)
    top = np.abs(array).max(initial=0.0)
    if top == 0:
        return array.astype(np.float32)
    unit = np.ldexp(1.0, int(np.frexp(top)[1]) - bits)
    return (np.rint(array / unit) * unit).astype(np.float32)


def stack(factors):
    """Stacked factors on their grid: {layer: (B [outputs, k], A [k, inputs])} of {layer: ([B of a client], [A])}."""
    found = {}
    for layer, (outer, inner) in factors.items():
        left, right = np.concatenate(outer, 1), np.concatenate(inner, 0)
        bits = min(23, (53 - math.ceil(math.log2(len(right)))) // 2)
        found[layer] = grid(left, bits), grid(right, bits)
    return found


def message(stacks):
    """What clients need to add stacks to their base, as {name: array}."""
    parts = ({layer + A + STACK: right, layer + B + STACK: left} for layer, (left, right) in stacks.items())
    return {name: array for part in parts for name, array in part.items()}


def product(left, right):
    """left @ right of factors on their grid, float32: exact but for one rounding of each element."""
    return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)


def shapes(schema):
    """{layer: (outputs, inputs)} of the layers of an adapter's schema."""
    return {layer: (schema.places[layer + B][3][0], schema.places[layer + A][3][1]) for layer in layers(schema.places)}


def nothing(schema):
    """A Flat of zeros, LAYER.delta [outputs, inputs], for the layers of an adapter's schema."""
    return flat.Flat(flat.Schema((layer + DELTA, np.float32, shape) for layer, shape in shapes(schema).items()))


def follow(changes, news):
    """Bring what has been added to the base, a Flat of LAYER.delta, up to date by a message; returns it."""
    for name, array in news.items():
        if name.endswith(DELTA):
            changes[name][...] = array
        elif name.endswith(A + STACK):
            layer = name.removesuffix(A + STACK)
            changes[layer + DELTA][...] += product(news[layer + B + STACK], array)
    return changes
