"""Who gets which row: training, validation and test first, then the training rows over the clients.

Everything here is a matter of row numbers and a generator; the same generator gives the same parts.
"""

import numpy as np

from gdmpi.errors import UserError

SPLIT = "_split"  # the column that tells the splits of a data set apart where they were put into one table
LISTED = 50  # values of a column that are told apart in a tally; the rarest beyond are put together


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


def set_aside(config, table, train, generator):
    """Cut data.public, a fraction, off the training rows: (train, public), arrays of ascending row numbers.

    A group lies in one of the two.
    """
    groups = None if config.data.group is None else list(table[config.data.group])
    groups = groups and [groups[row] for row in train]
    if (len(train) if groups is None else len(set(map(str, groups)))) < 2:
        raise UserError("data.public: the training rows are one row, or one group of data.group: too few to divide")
    kept, _, taken = held_out(groups, len(train), 0.0, config.data.public, generator)
    return train[kept], train[taken]


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
    _check_enough(n, clients)
    return [np.sort(rows) for rows in np.array_split(generator.permutation(n), clients)]


def by(values, clients):
    """Deal rows to clients by their values (strings): a list of arrays of ascending row numbers.

    All rows of a value go to one client: the value with most rows first, each to the client that has fewest rows then
    (Graham's longest-processing-time rule); of equals the first by name, and the lowest client. With as many values as
    clients each is one.
    """
    of_value = _rows_of_values(values)
    if len(of_value) < clients:
        raise UserError(
            f"clients.count: {clients} clients but only {len(of_value)} values of clients.split.column in the training "
            "rows; use fewer clients, or kind: dirichlet, which divides the rows of a value"
        )
    dealt, sizes = [[] for _ in range(clients)], np.zeros(clients, np.int64)
    for rows in of_value.values():
        client = int(sizes.argmin())
        dealt[client].append(rows)
        sizes[client] += len(rows)
    return [np.sort(np.concatenate(pieces)) for pieces in dealt]


def dirichlet(values, clients, alpha, generator):
    """Deal the rows of each value (a string) to clients in random shares: a list of arrays of ascending row numbers.

    The shares of a value are drawn from Dirichlet(alpha, ..., alpha) over the clients, as in Yurochkin et al. (arXiv
    1905.12022): clients differ in size too. It often goes by the name of Hsu et al. (arXiv 1909.06335), who draw a
    mixture of values for each client instead, all clients of one size. A share that is no number of whole rows is
    rounded up or down at random, to itself on average. A client left without rows, the lowest first, takes one of
    whichever client has most.
    """
    _check_enough(len(values), clients)
    dealt = [[] for _ in range(clients)]
    for rows in _rows_of_values(values).values():
        shares = np.cumsum(generator.dirichlet([alpha] * clients))
        # one random offset for all cuts: rounding each down would leave a value with a row always to one client
        cuts = np.floor(shares[:-1] * len(rows) + generator.random()).astype(np.int64)
        for client, piece in enumerate(np.split(generator.permutation(rows), cuts)):
            dealt[client].append(piece)
    dealt = [np.concatenate(pieces) for pieces in dealt]
    for client in range(clients):
        if not len(dealt[client]):
            most = max(range(clients), key=lambda other: len(dealt[other]))
            dealt[client], dealt[most] = dealt[most][:1], dealt[most][1:]
    return [np.sort(rows) for rows in dealt]


def column(table, name, rows, where, key="clients.split.column"):
    """The values of a column of a table in some rows, as strings; UserError if one has none, where names the table.

    Empty text is no value, since that is what a csv has for it. key: what in the configuration names the column.
    """
    if name not in table.column_names:
        raise UserError(f"{key}: {where} has no column {name!r}; it has {', '.join(table.column_names)}")
    values = list(table[name])
    values = [values[row] for row in rows]
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, (list, dict)):
            raise UserError(
                f"{key}: {where}: row {row + 1}: {name} is a {type(value).__name__}, not one value; "
                "choose another column"
            )
    missing = [row for row, value in zip(rows, values, strict=True) if _is_missing(value)]
    if missing:
        raise UserError(
            f"{key}: {where}: row {missing[0] + 1} has no {name} ({len(missing)} of these rows have "
            "none); give each a value, or leave them out"
        )
    return [str(value) for value in values]


def tally(values, dealt):
    """{"values", "rows"}: how many rows of each value each client has, as [[rows of a value] for each client].

    The commonest value comes first. Of more than LISTED the rarest are put together as the last.
    """
    names = list(_rows_of_values(values))
    listed = names if len(names) <= LISTED else [*names[: LISTED - 1], f"{len(names) - LISTED + 1} others"]
    place = {value: min(number, len(listed) - 1) for number, value in enumerate(names)}
    places = np.array([place[value] for value in values], np.int64)
    return {"values": listed, "rows": [np.bincount(places[rows], minlength=len(listed)).tolist() for rows in dealt]}


def _check_enough(n, clients):
    if clients > n:
        raise UserError(f"clients.count: {clients} clients but only {n} training rows; use fewer clients or more data")


def _rows_of_values(values):
    """{value: array of its ascending row numbers}, the value with most rows first, of equals the first by name."""
    rows = {}
    for row, value in enumerate(values):
        rows.setdefault(value, []).append(row)
    return {value: np.array(rows[value]) for value in sorted(rows, key=lambda value: (-len(rows[value]), value))}


def _is_missing(value):
    return value is None or value != value or (isinstance(value, str) and not value.strip())


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
