"""Partition: parts are disjoint, complete, near their size, respect groups, and depend on the generator alone."""

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


class Table(dict):
    """As much of a datasets.Dataset as parts() needs."""

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
