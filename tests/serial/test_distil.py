"""Losses and means of distillation, against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gdmpi import data, distil

torch = pytest.importorskip("torch")


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def kl(q, p):
    """Divergences of rows of probabilities, in numpy; 0 log 0 is 0."""
    return np.where(q > 0, q * (np.log(np.where(q > 0, q, 1)) - np.log(p)), 0).sum(-1)


def listed(q, k):
    """The k likeliest tokens of each row of probabilities, in some order, and what they have."""
    ids = np.argsort(-q, -1)[:, :k]
    return ids, np.take_along_axis(q, ids, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(0.5, 5))
def test_divergences_are_those_of_numpy(seed, vocabulary, tau):
    draw = np.random.default_rng(seed)
    teacher, student = 3 * draw.standard_normal((2, 4, vocabulary))
    q, p = softmax(teacher / tau), softmax(student / tau)
    tensors = torch.from_numpy(teacher), torch.from_numpy(student)
    assert np.allclose(distil.divergence(*tensors, tau).numpy(), kl(q, p), atol=1e-12)
    for k in range(1, vocabulary + 1):
        ids, shares = listed(q, k)
        own = np.take_along_axis(p, ids, 1)
        tails = (1 - each.sum(-1, keepdims=True) for each in (shares, own))
        pairs = zip((shares, own), tails, strict=True)
        expected = kl(q, p) if k == vocabulary else kl(*(np.concatenate(pair, 1) for pair in pairs))
        z = tensors[1].clone().requires_grad_()
        found = distil.tail_divergence(torch.from_numpy(ids), torch.from_numpy(shares), z, tau)
        assert np.allclose(found.detach().numpy(), expected, atol=1e-9)
        found.sum().backward()
        # p - q for what is listed; the tail's p is scaled to its q
        gradient = p * (1 - (1 - shares.sum(-1)) / np.maximum(1 - own.sum(-1), 1e-300))[:, None]
        np.put_along_axis(gradient, ids, own - shares, 1)
        assert np.allclose(tau * z.grad.numpy(), gradient, atol=1e-9)


def test_shares_above_one_by_rounding_are_no_gain():
    ids, student = torch.tensor([[0, 1]]), torch.zeros(1, 3)
    found = distil.tail_divergence(ids, torch.tensor([[0.75, 0.2502]]), student, 1.0)
    assert torch.isfinite(found).all() and found > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 4), st.data())
def test_mean_of_shares_is_that_of_a_table(seed, vocabulary, clients, more):
    k = more.draw(st.integers(1, vocabulary))
    draw = np.random.default_rng(seed)
    weights = draw.integers(1, 5, clients).tolist()
    received, table = [], np.zeros((3, vocabulary))
    for weight in weights:
        ids, shares = listed(softmax(2 * draw.standard_normal((3, vocabulary))), k)
        shares = shares.astype(np.float16)
        received.append((weight, {"ids": ids.astype(np.uint16), "shares": shares}))
        for position in range(3):
            table[position, ids[position]] += weight / sum(weights) * shares[position].astype(float)
    found = distil.mean(received, k)
    assert found["ids"].dtype == np.uint16 and found["shares"].dtype == np.float16 and found["ids"].shape == (3, k)
    assert all(len(set(ids)) == k for ids in found["ids"].tolist())
    own = np.take_along_axis(table, found["ids"].astype(int), 1)
    assert np.allclose(found["shares"], own, rtol=1e-3, atol=1e-7)
    assert np.allclose(np.sort(own), np.sort(table)[:, vocabulary - k :], rtol=1e-12)


def test_mean_of_logits_is_weighted():
    first, second = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    found = distil.mean([(3, {"logits": first}), (1, {"logits": second})])["logits"]
    assert np.allclose(found, np.average([first, second], 0, [3, 1]), atol=1e-7)
    assert np.array_equal(distil.mean([(7, {"logits": first})])["logits"], first)


def test_positions_are_spaced_over_the_response():
    target = np.array([False] * 3 + [True] * 7 + [False, True, True])
    rows = data.Rows(np.arange(13), target, np.array([0, 10, 13]), np.arange(2))
    assert np.flatnonzero(distil.spaced(rows, 3).target).tolist() == [3, 6, 9, 11, 12]
    assert np.flatnonzero(distil.spaced(rows, 1).target).tolist() == [3, 11]
    assert np.array_equal(distil.spaced(rows, 7).target, target)
