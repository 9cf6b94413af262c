"""Answer accuracy, where a response is one of a few labels: each held-out prompt with every label, the likeliest wins.

A row's candidates are rows themselves: its prompt with each label, the true one first. They travel with the held-out
rows, as Rows.answers, and are scored batch by batch as these are, so accuracy too is the same for any number of ranks.
"""

import math

import numpy as np

from gdmpi import evaluate
from gdmpi.encode import encode
from gdmpi.errors import UserError


def candidates(config, table, roles, tokenizer, template, rows, where):
    """Rows.answers for held-out rows of a table, None without evaluation.labels; for the arguments see encode().

    A row has as many as there are labels, one behind the other; their index is its position in rows. It has none if one
    of them does not fit within data.max_length. Raises UserError for a response that is no label.
    """
    labels = config.evaluation.labels
    if not labels or not len(rows):
        return None
    column, said = roles[_part(roles, where)], []
    responses = table.select_columns([column])[rows.index.tolist()][column]
    for number, response in zip(rows.index, map(str, responses), strict=True):
        if response not in labels:
            shown = f"{response[:40]!r} is" if config.clients.boundary != "site" else "is"  # a site's rows stay there
            raise UserError(
                f"evaluation.labels: {where}: row {number + 1}: the response {shown} none of {', '.join(labels)}; "
                "correct the labels, or leave them out (null)"
            )
        said.append([response, *(label for label in labels if label != response)])
    return tried(config, table, roles, tokenizer, template, rows.index, said, where)


def tried(config, table, roles, tokenizer, template, numbers, orders, where):
    """Rows of a table with each label in the place of the response, which is not read; index: positions in numbers.

    numbers: of the rows. orders: for each the labels, in the order in which its candidates follow each other. A row has
    none if one of them does not fit within data.max_length.
    """
    import datasets

    part, length, labels = _part(roles, where), config.data.max_length, orders[0]
    got = table.select_columns(list(set(roles.values())))[numbers.tolist()]
    said = [label for order in orders for label in order]
    columns = {column: [value for value in got[column] for _ in labels] for column in got} | {roles[part]: said}
    # a token more than a row may have: what is longer than that is cut, and known by it
    made, _ = encode(datasets.Dataset.from_dict(columns), roles, tokenizer, template, length + 1, where=where)
    owner = made.index // len(labels)
    fits = np.bincount(owner[np.diff(made.starts) <= length], minlength=len(numbers)) == len(labels)
    if not fits.any():
        raise UserError(f"evaluation.labels: {where}: no row has room for a label within data.max_length; raise it")
    made = made.take(np.flatnonzero(fits[owner]))
    _mark(made, said, len(labels), where)
    made.index = made.index // len(labels)
    return made


def _part(roles, where):
    """Which part of a row the response is; UserError if no column holds it alone."""
    part = next((part for part in ("response", "output") if part in roles), None)
    if part is None:
        raise UserError(f"evaluation.labels: {where}: has {', '.join(roles)}, and no column that holds responses alone")
    return part


def right(model, rows, wanted):
    """{batch number: (rows answered right, rows that have candidates)} for the wanted batches of evaluate.plan(rows).

    A candidate's likelihood is that of its target tokens, the label's and what ends it, as a sum and not a mean: labels
    are compared as what they are, whole answers. Right is a row whose true label is likelier than any other.
    """
    import torch

    model.model.eval()
    result, batches, answers = {}, evaluate.plan(rows), rows.answers
    with torch.inference_mode():
        for number in wanted:
            first, last = np.searchsorted(answers.index, (batches[number][0], batches[number][-1] + 1))
            losses = {}
            for ids in model.forward.groups(answers, range(first, last), evaluate.TOKENS):
                found = model.forward.losses(answers, ids).double()
                parts = found.split(answers.targets_of(ids))
                losses |= {i: float(part.sum()) for i, part in zip(ids, parts, strict=True)}
            scores = {}
            for i in range(first, last):
                scores.setdefault(int(answers.index[i]), []).append(losses[i])
            result[number] = (sum(true < min(others) for true, *others in scores.values()), len(scores))
    return result


def share(parts):
    """(share of the rows that are answered right, rows, {client: share} or None), from what right() gave on each rank.

    Where each client is scored by itself it is the mean over the clients; a row that several answer counts once. If
    there is a global model beside theirs, it is that one's.
    """
    batches, own = evaluate.merged(parts)
    each = {client: _share(values) for client, values in own.items()}
    counted = {str(client): hits / count for client, (hits, count) in each.items() if count}
    served = evaluate.served(parts)
    if served or not own:
        hits, count = _share(served or batches)
        return hits / count if count else math.nan, count, counted or None
    return evaluate.mean(counted) if counted else math.nan, sum(count for _, count in batches), counted or None


def _share(batches):
    """(rows answered right, rows) of batches as right() gives them."""
    return sum(hits for hits, _ in batches), sum(count for _, count in batches)


def _mark(made, said, labels, where):
    """Have each candidate's target begin where it differs from the row's others, if not before; UserError if never.

    Where a tokenizer loses characters of the prompt, a label's first tokens may not have been found to be targets.
    """
    for begin in range(0, len(made), labels):
        ids, seen = range(begin, begin + labels), {}
        tokens = [made.row(i)[0] for i in ids]
        for i, own in zip(ids, tokens, strict=True):
            label = said[made.index[i]]
            if (other := seen.setdefault(own.tobytes(), label)) != label:
                same = f"{other} and {label} are the same tokens to this tokenizer"
                raise UserError(f"evaluation.labels: {where}: {same}; choose others")
        pieces = np.array([own[: min(map(len, tokens))] for own in tokens])
        shared = int(np.cumprod((pieces == pieces[0]).all(0)).sum())
        for i in ids:
            target = made.row(i)[1]
            places = np.flatnonzero(target)
            target[max(1, min(shared, places[0])) : places[-1] + 1] = True
