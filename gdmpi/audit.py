"""Audit: can the rows that a run was trained on be told from rows that it was not? Membership inference.

Whoever has the base model and what the run came to can score a row and guess that the higher it scores, the likelier
it was trained on. Three scores, each over a row's target tokens:

    loss       minus the mean loss (Yeom et al., arXiv 1709.01604)
    reference  how much lower the mean loss is than the base model's: the log likelihood ratio with the pretrained
               model as reference (Mireshghallah et al., arXiv 2203.03929), a token
    min_k      the mean log-probability of the fifth of the tokens that are least likely (Min-K%, Shi et al.,
               arXiv 2310.16789, with k = 20)

A fourth, base, is minus the base model's own mean loss: what it tells apart is not membership but another difference
between the rows, with which loss and min_k come along (Meeus et al., arXiv 2406.17975).

How well a score tells them apart is said by the area under the ROC curve, and by the true-positive rate at 1 % false
positives, which counts the rows that leak rather than the average one (Carlini et al., arXiv 2112.03570).

Rows are scored in batches that do not depend on the ranks, members where their client is hosted; only scores travel.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from gdmpi import checkpoint, config as configuration, evaluate, flat, hosting, results, rng
from gdmpi.errors import UserError

ROWS = 1000  # of members, and of non-members, at most
FEWEST = 10  # rows that may be asked for: from fewer nothing can be told
LEAST = 0.2  # share of a row's target tokens that Min-K% looks at
FEW = 100  # non-members below which 1 % of them is less than one
RESAMPLES, AT_ONCE = 2000, 100  # of the bootstrap, and how many of them are in memory together
SCORES = {"loss": "loss", "reference": "loss less the base's", "min_k": f"Min-{LEAST:.0%}", "base": "base's loss alone"}
PLACES = ("run.device", "run.cache", "run.timeout", "model.name", "data.name", "clients.split.files")
KINDS = {"test": "test rows", "validation": "validation rows"}


def audit(link, source, words):
    """Audit a run directory or round file; the result as a plain dict at the server, None elsewhere.

    words: rows=N, at most so many members and so many non-members; client=N, only this client's rows are members; and
    where things lie now (PLACES). All ranks call it; UserError or PeerError on all ranks alike.
    """
    from gdmpi import build

    found = link.together(lambda: results.newest(source) if link.is_server else None)
    # the global state stays at the server
    state = link.share(found and dataclasses.replace(found[1], server={}))
    config, limit, clients = link.together(lambda: _options(source, state, words))
    adapter = link.together(lambda: _adapter(*found[:2], clients) if link.is_server else None)
    with link.phase(config.run.timeout):
        parts = build.build(link, config)
        link.together(lambda: _check(source, parts, state))
        pools, sizes = _pools(link, parts, clients)
        drawn = link.together(lambda: _draw(source, sizes, limit, config.run.seed))
        sampled = {key: rows.take(drawn[key]) for key, rows in pools.items() if key in drawn}
        # before anything is loaded the model is the base: an adapter as it begins changes nothing
        base = link.together(lambda: _losses(link, parts, sampled))
        values = link.bcast(state.round, adapter)
        link.together(lambda: parts.trainable and parts.trainable.put(values))
        adapted = link.together(lambda: _losses(link, parts, sampled))
        gathered = link.gather({key: _scores(adapted[key], base[key]) for key in base})
    if not link.is_server:
        return None
    scored = {key: rows for each in gathered for key, rows in each.items()}
    members, others = (
        np.array([row for key in sorted(scored) if (key[0] == "train") == wanted for row in scored[key]])
        for wanted in (True, False)
    )
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise UserError(f"{source}: some rows' losses are not finite: there is nothing to compare")
    generator, scores = rng.stream(config.run.seed, "audit bootstrap"), {}
    for i, name in enumerate(SCORES):
        scores[name] = attack(members[:, i], others[:, i], generator)
    for name in SCORES:
        scores[name]["means"] = meaning(name, scores)
    return {
        "run": str(source),
        "round": state.round,
        "rounds_planned": results.configuration_of(state).run.rounds,
        "result": results.called(config),
        "adapter_sha256": state.adapter_sha256,
        "model": f"{config.model.name}, {parts.config.model.form} on {parts.config.run.device}",
        "clients": clients,
        **_compared(sizes, drawn),
        "scores": scores,
        "notes": [*found[2], *(f"warning: {line}" for line in parts.about["warnings"]), *_notes(parts, drawn, others)],
    }


# ---- what is compared ----------------------------------------------------------------------------------------------


def _options(source, state, words):
    """(Config, rows at most, clients whose rows are members) from the run and the command line's words."""
    given = {key: value for key, _, value in (word.partition("=") for word in words) if key in ("rows", "client")}
    for key, value in given.items():
        if not value.isdecimal() or (key == "rows" and int(value) < FEWEST):
            raise UserError(f"{key}={value}: give a whole number, as in rows={ROWS} (at least {FEWEST}) or client=0")
    saved = configuration.movable(results.configuration_of(state))
    overrides = [word for word in words if word.partition("=")[0] not in given]
    config = configuration.load(overrides=overrides, base=saved.plain())
    for key in configuration.changes(saved, config):
        if key not in PLACES:
            raise UserError(f"{key}: an audit is of the run as it was; it takes rows, client, {', '.join(PLACES)}")
    trained = {client for t in range(1, max(state.round, 1) + 1) for client in hosting.cohort(config, t)}
    clients = sorted(trained)  # before round 1 those that would be
    if "client" in given and int(given["client"]) not in clients:
        raise UserError(f"client={given['client']}: no such client has been trained; there are {_shortly(clients)}")
    if "client" not in given and hosting.scattered(config):
        first = f"audit {source} client={clients[0]}"
        raise UserError(f"{source}: each client has its own adapter; audit one, as in '{first}'")
    return config, int(given.get("rows", ROWS)), [int(given["client"])] if "client" in given else clients


def _shortly(numbers):
    shown = ", ".join(map(str, numbers[:10]))
    return shown if len(numbers) <= 10 else f"{shown}, ... {numbers[-1]}"


def _adapter(path, state, clients):
    """What the run came to: the global adapter or model, or the only client's own."""
    found = results.adapters(path.parent, state.round, state.clients, results.server_of(state)[1])
    return found[None if None in found else clients[0]]


def _check(source, parts, state):
    """UserError if model or rows are not those of the run."""
    from gdmpi import build

    build.check_fit(parts, state)
    if parts.trainable and parts.trainable.schema != flat.Schema(state.about["schema"]):
        raise UserError(f"model.name: {parts.config.model.name} is not the model that the run began with")
    if _cut(parts.about) != _cut(state.about):
        raise UserError(f"{source}: data.name: these are not the rows of the run: there are more or fewer, or longer")


def _cut(about):
    """How many rows and tokens there are of each kind, by what they were read from, and how many rows a client has."""
    report = about["data"]
    own = report["clients"] if isinstance(report["clients"], list) else [{"pool": report}]
    cut = {
        (str(key), kind): (part[kind]["kept"], part[kind]["tokens"])
        for each in own
        for key, part in each.items()
        for kind in ("train", *KINDS)
        if part.get(kind)
    }
    return cut, about["rows"]


def _pools(link, parts, clients):
    """({(kind, key): Rows} of this rank, {(kind, key): how many rows} of all), kind being train or one of KINDS."""
    pools = {("train", str(client)): rows for client, rows in parts.rows.items() if client in clients}
    pools |= {(kind, str(key)): rows for kind in KINDS for key, rows, _ in parts.held_out.get(kind, ())}
    sizes = {}
    for each in link.agree({key: len(rows) for key, rows in pools.items()}):
        sizes |= each
    return pools, {key: sizes[key] for key in sorted(sizes) if sizes[key]}


def _of(kinds, sizes):
    return {key: n for key, n in sizes.items() if key[0] in kinds}


def _draw(source, sizes, limit, seed):
    """{(kind, key): row ids} of at most limit members and limit non-members; the same on every rank.

    Test rows alone are non-members if they are enough, since settings may have been chosen by the validation rows.
    """
    kinds, drawn = ["test"], {}
    if sum(_of(kinds, sizes).values()) < FEW:
        kinds = list(KINDS)
    if not _of(kinds, sizes):
        what = "data.validation and data.test are 0, so no rows were held out that the training rows could be told from"
        raise UserError(f"{source}: {what}; a run that shall be audited needs some")
    for purpose, some in (("members", _of(["train"], sizes)), ("non-members", _of(kinds, sizes))):
        total, begin = sum(some.values()), 0
        chosen = rng.stream(seed, f"audit {purpose}").choice(total, min(limit, total), replace=False)
        for key, n in some.items():
            drawn[key] = np.sort(chosen[(chosen >= begin) & (chosen < begin + n)]) - begin
            begin += n
    return drawn


def _compared(sizes, drawn):
    """{"members", "non_members": {kind: ...}}, each {"rows": how many are scored, "of": how many there are}."""
    kinds = dict.fromkeys(kind for kind, _ in drawn)
    counts = {
        kind: {"rows": sum(map(len, _of([kind], drawn).values())), "of": sum(_of([kind], sizes).values())}
        for kind in kinds
    }
    return {"members": counts.pop("train"), "non_members": {kind: counts[kind] for kind in KINDS if kind in counts}}


# ---- scores --------------------------------------------------------------------------------------------------------


def _losses(link, parts, sampled):
    """{(kind, key, batch): [losses of a row's target tokens]}: this rank's share of the rows, with the model as it is.

    Of rows that all client ranks have, each does some batches; the others are this rank's alone.
    """
    import torch

    found, model = {}, parts.trainable
    if model is None:
        return found
    model.model.eval()
    mine, workers = link.workers.index(link.rank), len(link.workers)
    for (kind, key), rows in sampled.items():
        batches = evaluate.plan(rows)
        for number in range(mine, len(batches), workers) if key in ("pool", "file") else range(len(batches)):
            losses = {}
            with torch.inference_mode():
                for ids in model.forward.groups(rows, batches[number], evaluate.TOKENS):
                    parted = model.forward.losses(rows, ids).double().cpu().split(rows.targets_of(ids))
                    losses |= {i: part.numpy() for i, part in zip(ids, parted, strict=True)}
            found[kind, key, number] = [losses[i] for i in batches[number]]
    return found


def _scores(adapted, base):
    """[(loss, reference, min_k, base)] of rows, from their target tokens' losses; higher means likelier a member."""

    def least_likely(losses):
        return np.sort(losses)[-max(1, int(LEAST * len(losses))) :]

    return [
        (-own.mean(), was.mean() - own.mean(), -least_likely(own).mean(), -was.mean())
        for own, was in zip(adapted, base, strict=True)
    ]


def attack(members, others, generator):
    """How well a score tells members from others: {"auc", "auc_95", "tpr", "tpr_95", "tpr_guessing"}.

    members, others: scores of rows. Intervals hold 95 % of the resamples of a bootstrap of both. tpr is at 1 % false
    positives; as its threshold is set by the few highest others, guessing finds more than 1 % by chance: 97.5 % of the
    permutations of who is a member find at most tpr_guessing. All that is None below FEW others.
    """
    values, codes = np.unique(np.concatenate([members, others]), return_inverse=True)
    parts = codes[: len(members)], codes[len(members) :]
    auc, tpr = (float(found[0]) for found in rates(*(_counted(part[None], len(values)) for part in parts)))
    again, guessed = [], []
    for _ in range(0, RESAMPLES, AT_ONCE):
        resampled = (part[generator.integers(len(part), size=(AT_ONCE, len(part)))] for part in parts)
        again.append(rates(*(_counted(part, len(values)) for part in resampled)))
        shuffled = np.split(generator.permuted(np.tile(codes, (AT_ONCE, 1)), axis=1), [len(members)], axis=1)
        guessed.append(rates(*(_counted(part, len(values)) for part in shuffled))[1])
    auc_95, tpr_95 = (np.quantile(found, (0.025, 0.975)).tolist() for found in np.concatenate(again, 1))
    result = {"auc": auc, "auc_95": auc_95, "tpr": None, "tpr_95": None, "tpr_guessing": None}
    if len(others) >= FEW:
        result |= {"tpr": tpr, "tpr_95": tpr_95, "tpr_guessing": float(np.quantile(guessed, 0.975))}
    return result


def _counted(codes, size):
    """How often each code below size is in each line of codes: [lines, size]."""
    lines = len(codes)
    return np.bincount((codes + size * np.arange(lines)[:, None]).ravel(), minlength=lines * size).reshape(lines, size)


def rates(members, others):
    """(AUC, true-positive rate at 1 % false positives) of each line of counts, [lines, scores], by ascending score.

    The AUC is Mann-Whitney's: the share of pairs in which the member scores higher, ties counting half. The rate is the
    highest of those thresholds that flag at most 1 % of the others, rows of one score all or none.
    """
    pairs = members.sum(1) * others.sum(1)
    below = np.cumsum(others, 1) - others
    auc = (members * (2 * below + others)).sum(1) / (2 * pairs)
    hits, false = (np.cumsum(counts[:, ::-1], 1) for counts in (members, others))
    allowed = 100 * false <= false[:, -1:]
    return auc, np.where(allowed, hits, 0).max(1) / hits[:, -1]


# ---- words ---------------------------------------------------------------------------------------------------------


def meaning(name, scores):
    """What the numbers of attack() with a score mean, in a sentence. scores: {name: result} of all."""
    result = scores[name]
    low, high = result["auc_95"]
    if name == "base":
        found = [each for each in scores if each != "base" and _finds(scores[each])]
        if low <= 0.5 <= high:
            more = ": what the other scores find comes from it" if found else ", either"
            return f"before this training the rows are not told apart{more}"
        # the reference takes away what the base says of a row
        found = [SCORES[each] for each in found if each != "reference"]
        part = f": part of what {' and '.join(found)} find{'s' * (len(found) == 1)} is that"
        return "the rows differ before this training" + part * bool(found)
    if low <= 0.5 <= high:
        text = "not told from guessing, which gives 0.5"
    elif high < 0.5:
        text = "below 0.5: members look less like members than others do, so the two differ in more than membership"
    else:
        text = f"better than guessing: of a member and a non-member it names the member in {result['auc']:.0%} of cases"
    if result["tpr"] is None:
        return text
    more = "more" if result["tpr"] > result["tpr_guessing"] else "no more"
    guessing = f"{more} than guessing, which finds up to {result['tpr_guessing']:.1%}"
    return f"{text}; with 1 false alarm in 100 it finds {result['tpr']:.1%} of the members, {guessing}"


def _finds(result):
    """Whether members are told from others, in either direction."""
    low, high = result["auc_95"]
    return not low <= 0.5 <= high or (result["tpr"] is not None and result["tpr"] > result["tpr_guessing"])


def _notes(parts, drawn, others):
    """What else to know about the numbers, as lines."""
    from gdmpi import data

    config, notes = parts.config, []
    if len(others) < FEW:
        notes.append(f"a rate at 1% false positives cannot be told from fewer than {FEW} non-members")
    files = sorted({kind for kind, _ in drawn if kind != "train" and data.is_file(config, kind)})
    if files:
        notes.append(
            f"the {' and '.join(files)} rows have a file of their own: they may differ in more than membership"
        )
    reach = (config.train.steps or 0) * config.train.batch_size
    if config.train.steps and any(reach < n for n in parts.about["rows"].values()):
        notes.append("train.steps: rows that no step has come to count as members too, which hides some of the leak")
    return notes


def report(result):
    """The result of audit() as lines to print."""
    of, others = result["members"], result["non_members"]
    whose = f"client{'s' * (len(result['clients']) > 1)} {_shortly(result['clients'])}"
    kinds = " and ".join(f"{n['rows']:,} of {n['of']:,} {KINDS[kind]}" for kind, n in others.items())
    lines = [
        "{run}: round {round} of {rounds_planned}, {result} {adapter_sha256}".format_map(result),
        f"  model        {result['model']}",
        f"  members      {of['rows']:,} of {of['of']:,} training rows of {whose}",
        f"  non-members  {kinds}",
        f"  {'a row scored by':22}{'AUC (95%)':26}found at 1% false positives (95%)",
    ]
    for name, found in result["scores"].items():
        auc, tpr = (
            "cannot be told" if found[key] is None else form.format(found[key], *found[f"{key}_95"])
            for key, form in (("auc", "{:.3f} ({:.3f} to {:.3f})"), ("tpr", "{:.1%} ({:.1%} to {:.1%})"))
        )
        lines.append(f"  {SCORES[name]:22}{auc:26}{tpr}")
    lines += [f"  {SCORES[name]}: {found['means']}" for name, found in result["scores"].items()]
    lines += [f"  {note}" for note in result["notes"]]
    return [*lines, "  a low number is no proof of privacy: other attacks may find more"]


def check_out(path):
    """UserError if a file for the result could not be written."""
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: there is no directory {Path(path).parent}; make it first")


def write(result, path):
    """Write the result as JSON; UserError if that cannot be."""
    try:
        checkpoint.write_text(Path(path), json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
