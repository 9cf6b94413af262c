"""How far the clients of a round are apart, and what is lost by averaging the factors of LoRA one by one.

With LoRA a client learns B_i A_i, and the server averages B and A, each by itself: mean(B) mean(A) is not mean(BA)
(FLoRA, arXiv 2409.05976, is about the difference). Its size relative to mean(BA) is estimated without ever
forming a product of full size, and without the factors of any client: each sends S B_i and A_i X, where S [SIZE,
outputs] and X [inputs, SIZE] are Gaussian and the same everywhere. ||S M X|| is ||M|| on average (Johnson and
Lindenstrauss), so that over the layers of a model the ratio is right to some percent.
"""

import math

import numpy as np

from gdmpi import lowrank, rng

SIZE = 8  # rows of a sketch: a client sends 2 * SIZE * r numbers a layer


def pairs(schema):
    """[(name of A, name of B)] of the LoRA layers of a schema; empty where other things are trained."""
    return [(layer + lowrank.A, layer + lowrank.B) for layer in lowrank.layers(schema.places)]


def bank(schema):
    """(S, X) for all layers, of which each takes the first columns and rows: [SIZE, outputs], [inputs, SIZE]."""
    found = pairs(schema)
    inputs = max((schema.places[a][3][1] for a, _ in found), default=0)
    outputs = max((schema.places[b][3][0] for _, b in found), default=0)
    draw = rng.stream(0, "sketch")
    return tuple(
        (draw.standard_normal(shape) / math.sqrt(SIZE)).astype(np.float32)
        for shape in ((SIZE, outputs), (inputs, SIZE))
    )


def sketch(model, made, schema=None):
    """S B and A X of each layer of a views.Trainable, one after the other, float32 [2 * SIZE * sum of ranks].

    made: bank() of its schema. schema: of its first layers, if only they are wanted.
    """
    import torch

    left, right = (torch.from_numpy(each).to(model.device) for each in made)
    values = dict(zip(model.trained.places, model.parameters, strict=True))
    parts = []
    with torch.no_grad():
        for a, b in pairs(schema or model.trained):
            parts += [
                (left[:, : len(values[b])] @ values[b]).reshape(-1),
                (values[a] @ right[: values[a].shape[1]]).reshape(-1),
            ]
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, np.float32)


def aggregation_error(schema, sketches, weights):
    """||mean(BA) - mean(B) mean(A)|| / ||mean(BA)|| over all layers, estimated; None without LoRA or with mean(BA) 0.

    sketches: [sketch() of a client], of all layers or of the first; weights: theirs. Frobenius norms.
    """
    shares = np.asarray(weights, np.float64) / sum(weights)
    each = np.stack([np.asarray(one, np.float64) for one in sketches])
    difference, whole, place = 0.0, 0.0, 0
    for a, _ in pairs(schema):
        rank = schema.places[a][3][0]
        if place == each.shape[1]:
            break
        left, right = np.split(each[:, place : place + 2 * SIZE * rank], 2, 1)
        left, right = left.reshape(-1, SIZE, rank), right.reshape(-1, rank, SIZE)
        place += 2 * SIZE * rank
        of_products = np.einsum("c,cij,cjk->ik", shares, left, right)
        of_means = np.einsum("c,cij->ij", shares, left) @ np.einsum("c,cjk->jk", shares, right)
        difference += float(((of_products - of_means) ** 2).sum())
        whole += float((of_products**2).sum())
    return math.sqrt(difference / whole) if whole else None


def cosine(norms, weights, of_mean):
    """Mean cosine between the deltas of different clients, each pair weighing by its norms; None for fewer than two.

    norms, weights: of the clients. of_mean: norm of the weighted mean delta, which with the clients' own tells it.
    """
    shares = [weight * norm / sum(weights) for weight, norm in zip(weights, norms, strict=True)]
    own = math.fsum(share**2 for share in shares)
    pairs_of_norms = math.fsum(shares) ** 2 - own
    return (of_mean**2 - own) / pairs_of_norms if len(shares) > 1 and pairs_of_norms > 0 else None
