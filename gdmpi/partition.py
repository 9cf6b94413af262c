"""Who gets which row: training, validation and test first, then the training rows over the clients.

Everything here is a matter of row numbers and a generator; the same generator gives the same parts.
"""

import numpy as np

from gdmpi.errors import UserError

SPLIT = "_split"  # the column that tells the splits of a data set apart where they were put into one table


def parts(config, table, held, generator, name):
    """The row numbers of [train, validation, test] in a table, and how many groups there are or None.

    held is {"validation": v, "test": v}: a fraction, a value of the split column (of SPLIT, without data.split_column),
    or None for an empty part. name stands for the table in errors.
    """
    data, there = config.data, table.column_names
    for key in ("split_column", "group"):
        column = getattr(data, key)
        if column is not None and column not in there:
            raise UserError(f"data.{key}: {name} has no column {column!r}; it has {', '.join(there)}")
    groups = None if data.group is None else list(table[data.group])
    values = {key: value for key, value in held.items() if isinstance(value, str)}
    column = data.split_column or SPLIT
    for key, value in values.items():
        if column not in there:
            raise UserError(
                f"data.{key}: {value!r} is no split of {name}; give a fraction, a file or data.split_column"
            )
    rows = [np.arange(len(table)), np.zeros(0, np.int64), np.zeros(0, np.int64)]
    if column in there:
        wanted = (data.train or "train", values.get("validation"), values.get("test"))
        rows = list(by_values(table[column], *wanted, groups))
    fractions = [0.0 if key in values else held[key] or 0.0 for key in ("validation", "test")]
    train = rows[0]
    of_train = None if groups is None else [groups[row] for row in train]
    cut = held_out(of_train, len(train), *fractions, generator)
    rows = [train[cut[0]], *(train[new] if len(new) else old for old, new in zip(rows[1:], cut[1:], strict=True))]
    return rows, None if groups is None else len({str(group) for group in groups})


def held_out(groups, n, validation, test, generator):
    """Cut n rows into (train, validation, test), arrays of ascending row numbers, by fractions.

    groups gives each row's group, or is None: rows with equal values stay in one part. Among the groups drawn in
    random order a part takes those that bring it nearer to its fraction of the rows, so no further training group
    would (unless it is the last). A fraction of 0 gives an empty part, any other at least one group; so does train.
    """
    if validation + test >= 1:
        raise UserError(f"data.validation, data.test: {validation:g} and {test:g} leave nothing to train on")
    member = np.arange(n) if groups is None else _codes(groups)
    sizes = np.bincount(member)
    parts = 1 + (validation > 0) + (test > 0)
    if len(sizes) < parts:
        found = f"{n} rows" if groups is None else f"{len(sizes)} groups of data.group"
        raise UserError(
            f"data.validation, data.test: {found} are too few for {parts} parts; "
            "use more, or give a part a fraction of 0"
        )
    left = generator.permutation(len(sizes)).tolist()
    part = np.zeros(len(sizes), np.int8)
    # test first: another validation fraction then leaves the test rows as they are
    for number, fraction in ((2, test), (1, validation)):
        if fraction > 0:
            reserve = 2 if number == 2 and validation > 0 else 1
            taken = _take(left, sizes, max(1, int(fraction * n + 0.5)), reserve)
            part[taken] = number
            left = [group for group in left if not part[group]]
    return tuple(np.flatnonzero(part[member] == number) for number in range(3))


def by_values(values, train, validation, test, groups=None):
    """The rows whose value is train, validation and test, as (train, validation, test); None gives an empty part.

    Rows with other values are in none. With groups, a group that lies in two of the parts is an error.
    """
    values = np.array([str(value) for value in values], object)
    if validation is not None and validation == test:
        raise UserError(f"data.validation, data.test: both are {test}; validate on other rows than the final test's")
    for key, value in (("train", train), ("validation", validation), ("test", test)):
        if value is not None and not np.any(values == value):
            there = ", ".join(sorted(set(values))[:20])
            raise UserError(f"data.{key}: no row belongs to {value!r}; the values there are: {there}")
        if key != "train" and value == train:
            raise UserError(f"data.{key}: {value!r} holds the training rows; name another value, or a fraction")
    parts = tuple(np.flatnonzero(values == value) for value in (train, validation, test))
    if groups is not None:
        _forbid_crossing(groups, parts)
    return parts


def iid(n, clients, generator):
    """Deal n rows to clients at random: a list of arrays of ascending row numbers, sizes differ by at most one."""
    if clients > n:
        raise UserError(f"clients.count: {clients} clients but only {n} training rows; use fewer clients or more data")
    return [np.sort(rows) for rows in np.array_split(generator.permutation(n), clients)]


def _codes(groups):
    """Groups as numbers, in the order of their first row."""
    seen = {}
    return np.array([seen.setdefault(str(group), len(seen)) for group in groups], np.int64)


def _take(left, sizes, wanted, reserve):
    """The groups of left, tried in order, that together come close to the wanted rows; reserve groups must remain."""
    taken, rows = [], 0
    for group in left:
        if rows >= wanted or len(left) - len(taken) <= reserve:
            break
        if abs(rows + sizes[group] - wanted) < wanted - rows:
            taken.append(group)
            rows += sizes[group]
    return taken or [min(left, key=lambda group: sizes[group])]


def _forbid_crossing(groups, parts):
    names, first = ("train", "validation", "test"), {}
    for name, rows in zip(names, parts, strict=True):
        for row in rows:
            group = str(groups[int(row)])
            if first.setdefault(group, name) != name:
                raise UserError(
                    f"data.group: {group!r} lies in both {first[group]} and {name}; "
                    "give all its rows one part, or leave data.group out"
                )
