"""Partition: parts are disjoint, complete, near their size, respect groups, and depend on the generator alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from gdmpi import partition, rng
from gdmpi.config import Config, UserError

FRACTIONS = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.4])


def stream(seed=0):
    return rng.stream(seed, "test")


def is_partition(parts, n):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@given(n=st.integers(3, 300), validation=FRACTIONS, test=FRACTIONS, seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_rows_are_cut_by_fractions(n, validation, test, seed):
    parts = partition.held_out(None, n, validation, test, stream(seed))
    assert is_partition(parts, n)
    assert len(parts[0]) >= 1
    for part, fraction in zip(parts[1:], (validation, test), strict=True):
        assert (len(part) == 0) == (fraction == 0)
        assert abs(len(part) - max(1, fraction * n)) <= 1 or n < 10
    again = partition.held_out(None, n, validation, test, stream(seed))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert all(np.all(np.diff(part) > 0) for part in parts)


@given(groups=st.lists(st.integers(0, 30), min_size=3, max_size=200), validation=FRACTIONS, test=FRACTIONS)
@settings(max_examples=60, deadline=None)
def test_groups_stay_whole_and_sizes_are_close(groups, validation, test):
    assume(len(set(groups)) >= 3)
    n, groups = len(groups), np.array(groups)
    parts = partition.held_out(groups, n, validation, test, stream())
    assert is_partition(parts, n)
    of_part = [set(groups[part].tolist()) for part in parts]
    assert not (of_part[0] & of_part[1] or of_part[0] & of_part[2] or of_part[1] & of_part[2])
    assert of_part[0]
    sizes = [int(np.sum(groups == group)) for group in of_part[0]]
    for part, fraction in zip(parts[1:], (validation, test), strict=True):
        assert (len(part) == 0) == (fraction == 0)
        if fraction and len(sizes) > 1:  # no training group would bring the part nearer to what it should be
            wanted = max(1, int(fraction * n + 0.5))
            assert all(abs(len(part) + size - wanted) >= abs(len(part) - wanted) for size in sizes)


def test_large_groups_leave_something_to_train_on():
    groups = ["a"] * 98 + ["b", "c"]
    for seed in range(20):
        parts = partition.held_out(groups, 100, 0.1, 0.1, stream(seed))
        assert sorted(map(len, parts)) == [1, 1, 98]
        assert len(parts[0]) == 98


def test_the_test_rows_do_not_depend_on_the_validation_fraction():
    one = partition.held_out(None, 100, 0.1, 0.2, stream())
    other = partition.held_out(None, 100, 0.3, 0.2, stream())
    assert np.array_equal(one[2], other[2])


@pytest.mark.parametrize(
    ("groups", "n", "validation", "test", "match"),
    [
        (None, 10, 0.5, 0.5, "0.5 and 0.5 leave nothing to train on"),
        (None, 2, 0.1, 0.1, "2 rows are too few for 3 parts"),
        (["x"] * 50, 50, 0.1, 0, "1 groups of data.group are too few for 2 parts"),
    ],
)
def test_no_room_for_all_parts(groups, n, validation, test, match):
    with pytest.raises(UserError, match=match):
        partition.held_out(groups, n, validation, test, stream())


def test_values_name_the_parts():
    values = ["train", "dev", "test", "train", "unused", "dev"]
    train, validation, test = partition.by_values(values, "train", "dev", "test")
    assert (train.tolist(), validation.tolist(), test.tolist()) == ([0, 3], [1, 5], [2])
    train, validation, test = partition.by_values([1, 0, 1], "1", None, "0", groups=["a", "b", "a"])
    assert (train.tolist(), validation.tolist(), test.tolist()) == ([0, 2], [], [1])


@pytest.mark.parametrize(
    ("names", "groups", "match"),
    [
        (("train", "val", "test"), None, "data.validation: no row belongs to 'val'; .* are: dev, test, train"),
        (("training", "dev", "test"), None, "data.train: no row belongs to 'training'"),
        (("train", "test", "test"), None, "both are test"),
        (("train", "dev", "train"), None, "data.test: 'train' holds the training rows"),
        (("train", "dev", "test"), ["p", "q", "r", "r"], "data.group: 'r' lies in both train and test"),
    ],
)
def test_wrong_values(names, groups, match):
    with pytest.raises(UserError, match=match):
        partition.by_values(["train", "dev", "test", "train"], *names, groups)


@given(n=st.integers(1, 200), clients=st.integers(1, 20), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_iid_deals_all_rows_evenly(n, clients, seed):
    assume(clients <= n)
    dealt = partition.iid(n, clients, stream(seed))
    assert len(dealt) == clients
    assert is_partition(dealt, n)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    again = partition.iid(n, clients, stream(seed))
    assert all(np.array_equal(a, b) for a, b in zip(dealt, again, strict=True))


def test_iid_depends_on_the_seed():
    assert not np.array_equal(partition.iid(100, 2, stream(0))[0], partition.iid(100, 2, stream(1))[0])


def test_more_clients_than_rows():
    with pytest.raises(UserError, match="10 clients but only 7 training rows"):
        partition.iid(7, 10, stream())


VALUES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=200)


@given(values=VALUES, clients=st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_values_are_dealt_whole_and_clients_are_about_as_large(values, clients):
    sizes = Counter(values)
    assume(clients <= len(sizes))
    dealt = partition.by(values, clients)
    assert is_partition(dealt, len(values))
    assert all(np.all(np.diff(rows) > 0) for rows in dealt)
    owners = [{values[row] for row in rows} for rows in dealt]
    assert len(owners) == clients
    assert sum(map(len, owners)) == len(sizes)
    assert all(owners)
    # no client is larger than the smallest by more than the smallest value that it holds (list scheduling)
    smallest = min(map(len, dealt))
    assert all(
        len(rows) - min(sizes[value] for value in owned) <= smallest for rows, owned in zip(dealt, owners, strict=True)
    )
    if clients == len(sizes):
        assert [owned.pop() for owned in owners] == sorted(sizes, key=lambda value: (-sizes[value], value))


def test_values_go_to_the_smallest_client_the_largest_first():
    values = [*"aaaaaaa", *"bbbbb", *"cccc", *"ddd", *"ee"]
    dealt = [{values[row] for row in rows} for rows in partition.by(values, 2)]
    assert dealt == [{"a", "d"}, {"b", "c", "e"}]  # 7; 5, 9; 10; 11


def test_a_client_may_have_no_share_of_a_value():
    with pytest.raises(UserError, match="3 clients but only 2 values of clients.split.column .* kind: dirichlet"):
        partition.by(["a", "b", "a"], 3)


@given(
    values=VALUES,
    clients=st.integers(1, 12),
    alpha=st.sampled_from([1e-300, 0.01, 0.5, 100, 1e9]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_dirichlet_deals_every_row_once_and_leaves_no_client_without(values, clients, alpha, seed):
    assume(clients <= len(values))
    dealt = partition.dirichlet(values, clients, alpha, stream(seed))
    assert len(dealt) == clients
    assert is_partition(dealt, len(values))
    assert all(len(rows) and np.all(np.diff(rows) > 0) for rows in dealt)
    again = partition.dirichlet(values, clients, alpha, stream(seed))
    assert all(np.array_equal(a, b) for a, b in zip(dealt, again, strict=True))


def distance(values, dealt):
    """Mean over the clients of the total variation between a client's values and all, weighted by rows: 0 if alike."""
    counts = np.array(partition.tally(values, dealt)["rows"], float)
    pooled, own = counts.sum(0) / counts.sum(), counts / counts.sum(1, keepdims=True)
    return float(counts.sum(1) / counts.sum() @ np.abs(own - pooled).sum(1) / 2)


def test_clients_differ_the_more_the_smaller_alpha_is():
    values = [str(number % 7) for number in range(2100)]
    alphas = (0.01, 0.1, 1, 10, 100, 1e6)
    means = [
        np.mean([distance(values, partition.dirichlet(values, 5, alpha, stream(seed))) for seed in range(8)])
        for alpha in alphas
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.6 and means[-1] < 0.01
    assert means[0] < distance(values, partition.by(values, 5)) + 0.2


def test_shares_have_the_moments_of_dirichlet():
    """Mean 1 / K and variance (K - 1) / (K^2 (K alpha + 1)), of 400 values with 1,000 rows each."""
    values, clients, alpha = [str(number % 400) for number in range(400_000)], 4, 0.5
    dealt = partition.dirichlet(values, clients, alpha, stream())
    shares = np.array([np.bincount([int(values[row]) for row in rows], minlength=400) for rows in dealt]) / 1000
    assert np.allclose(shares.sum(0), 1)
    assert np.allclose(shares.mean(1), 1 / clients, atol=0.05)
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.var(1).mean() == pytest.approx(variance, rel=0.1)


def test_values_of_one_row_do_not_all_go_to_one_client():
    values = [str(number) for number in range(1000)]
    sizes = [len(rows) for rows in partition.dirichlet(values, 5, 1e9, stream())]
    assert min(sizes) > 150, "with equal shares each client gets a fifth"


def test_a_client_without_rows_takes_one_of_the_largest():
    """With so small an alpha the only value goes to one client whole."""
    sizes = [len(rows) for rows in partition.dirichlet(["a"] * 10, 4, 1e-300, stream())]
    assert sorted(sizes) == [1, 1, 1, 7]
    with pytest.raises(UserError, match="11 clients but only 10 training rows"):
        partition.dirichlet(["a"] * 10, 11, 1.0, stream())


def test_a_tally_counts_and_puts_rare_values_together():
    assert partition.tally(["x", "y", "x", "z"], [np.array([0, 3]), np.array([1, 2])]) == {
        "values": ["x", "y", "z"],
        "rows": [[1, 0, 1], [1, 1, 0]],
    }
    values = [str(number // 2) for number in range(160)]
    counted = partition.tally(values, [np.arange(100), np.arange(100, 160)])
    assert len(counted["values"]) == partition.LISTED
    assert counted["values"][-1] == "31 others"
    assert [sum(rows) for rows in counted["rows"]] == [100, 60]
    assert sum(rows[-1] for rows in counted["rows"]) == 62


class Table(dict):
    """As much of a datasets.Dataset as parts() and column() need."""

    def __len__(self):
        return len(next(iter(self.values())))

    @property
    def column_names(self):
        return list(self)


def test_parts_joins_values_and_fractions():
    table = Table({partition.SPLIT: ["train"] * 20 + ["dev"] * 3, "who": [i // 2 for i in range(20)] + [90, 91, 92]})
    config = Config.model_validate({"data": {"group": "who", "validation": "dev"}})
    (train, validation, test), groups = partition.parts(
        config, table, {"validation": "dev", "test": 0.2}, stream(), "t"
    )
    assert validation.tolist() == [20, 21, 22]
    assert len(test) == 4
    assert is_partition([train, test], 20)
    assert not {i // 2 for i in train} & {i // 2 for i in test}
    assert groups == 13
    with pytest.raises(UserError, match="data.test: 'x' is no split of t"):
        partition.parts(config, Table(who=[1, 2]), {"validation": 0.1, "test": "x"}, stream(), "t")
    with pytest.raises(UserError, match="data.group: t has no column 'who'; it has a"):
        partition.parts(config, Table(a=[1, 2]), {"validation": 0.1, "test": 0.1}, stream(), "t")


def test_values_of_a_column_are_text():
    table = Table(site=[3, 1.5, True, "x", None])
    assert partition.column(table, "site", np.array([3, 0, 2, 1]), "t") == ["x", "3", "True", "1.5"]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (["a", None, "b", None], "t: row 2 has no site .2 of these rows have none.; give each a value"),
        ([1.0, 2.0, float("nan"), 3.0], "t: row 3 has no site .1 of these rows"),
        (["a", "b", "c", " "], "t: row 4 has no site"),
        (["a", ["b"], "c", "d"], "t: row 2: site is a list, not one value"),
    ],
)
def test_rows_without_a_value_are_refused(values, match):
    with pytest.raises(UserError, match=f"^clients.split.column: {match}"):
        partition.column(Table(site=values), "site", np.arange(4), "t")


def test_a_column_that_is_not_there():
    with pytest.raises(UserError, match="^clients.split.column: t has no column 'sit'; it has site$"):
        partition.column(Table(site=["a"]), "sit", np.arange(1), "t")
