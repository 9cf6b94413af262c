"""Where runs stand: what a round has cost, the last one within a budget, and runs over seeds as lines."""

import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gdmpi import config as configuration, report
from gdmpi.errors import UserError

BUDGETS = ("rounds", "bytes", "tokens", "seconds")
UNITS = {"": 1, "b": 1, **{f"{p}{b}b": (1024 if b else 1000) ** k for k, p in enumerate("kmgt", 1) for b in ("", "i")}}
OWN = ("run.name", "run.out", "run.seed")  # settings in which the runs of a line may differ
SPENT = ("bytes", "tokens", "seconds")
COSTS = (  # of a client or the server by itself: bytes, operations and seconds are sums over the rounds
    *("bytes_down_per_client", "bytes_up_per_client", "flops_per_client", "seconds_train", "seconds_server"),
    *("peak_memory_client", "peak_memory_server"),
)
GENERATED = ("bleu", "rouge_l", "chrf")  # scores of answers to held-out prompts
# Student's t, 97.5 %, for 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass
class Line:
    """Runs that differ in nothing but the seed. runs: {seed: report.Run}; points: {seed: what point() gives}.

    label: what tells it from the others, short. names: {seed: the like of each run}.
    """

    label: str
    runs: dict
    points: dict
    names: dict

    @property
    def first(self):
        """Any of the runs, for what they have in common."""
        return next(iter(self.runs.values()))

    @property
    def method(self):
        """The method in words, with what is trained or travels where that is all weights."""
        config = self.first.config
        whole = "full" if config.model.adapter.kind == "full" else config.exchange.what
        return Path(config.method.name).stem + f" {whole}" * (whole != "trained")


def budget_of(text):
    """(what, how much) of --at: rounds=10, bytes=50MB, tokens=2e6 or seconds=600; UserError if it is neither."""
    found = re.fullmatch(r"(\w+)=([\d_.]+(?:e\+?\d+)?)\s*(|[kmgt]?i?b)", text.strip(), re.I)
    try:
        what, number, unit = found[1].lower(), float(found[2]), found[3].lower()
        if what in BUDGETS and (what == "bytes" or not unit):
            return what, number * UNITS[unit]
    except (TypeError, ValueError, KeyError):
        pass
    raise UserError(f"--at {text}: not understood; give rounds=10, bytes=50MB, tokens=2e6 or seconds=600") from None


def spent(rows):
    """What a run has spent by the end of each of its rows: [{"rounds", "bytes", "tokens", "seconds"}].

    bytes: what all clients of the rounds sent and received, each counted as if it were alone on its rank. seconds: of
    the rounds from the first on, with their evaluation; not the start.
    """
    columns = {
        "bytes": [row["clients"] * (row["bytes_up_per_client"] + row["bytes_down_per_client"]) for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "seconds": [row["seconds"]["total"] for row in rows],
    }
    sums = {key: list(itertools.accumulate(values)) for key, values in columns.items()}
    return [{"rounds": row["round"], **{key: sums[key][n] for key in sums}} for n, row in enumerate(rows)]


def point(run, budget=None):
    """Where a run stands: at its last evaluated round within a budget, or its last of all.

    It is the last round of all kinds where none has validation rows.
    """
    totals = spent(run.rows)
    what, limit = budget or ("rounds", math.inf)
    within = [number for number, total in enumerate(totals) if total[what] <= limit] or [0]
    evaluated = [number for number in within if run.rows[number]["eval_loss"] is not None]
    number = (evaluated or within)[-1]
    row, test = run.rows[number], run.rows[number].get("test") or {}
    last = totals[-1][what] - totals[-2][what] if len(totals) > 1 else 0
    return {
        "round": row["round"],
        "eval_loss": row["eval_loss"],
        "eval_perplexity": row["eval_perplexity"],
        "eval_accuracy": row["eval_accuracy"],
        **{f"test_{key}": test.get(key) for key in ("loss", "perplexity", "accuracy", *GENERATED)},
        **{f"eval_{key}": (row.get("eval_generated") or {}).get(key) for key in GENERATED},
        **{key: totals[number][key] for key in SPENT},
        **costs(run.rows[: number + 1]),
        "tokens_per_second": report.pace(run.rows[: number + 1], "tokens"),
        "adapter_sha256": row["adapter_sha256"],
        "ended": budget is not None and totals[-1][what] + last <= limit,  # with room for one more round like its last
    }


def costs(rows):
    """COSTS by the end of some rows: {key: number}.

    flops_per_client, as counted for the client of a round that has the most. seconds_train: of the slowest rank.
    """
    found = {key: max(row[key] for row in rows) for key in COSTS if key.startswith("peak")}
    for key in COSTS:
        kind, _, part = key.partition("_")
        if kind != "peak":
            found[key] = math.fsum(row["seconds"][part] if kind == "seconds" else row[key] for row in rows)
    return found


def in_lines(runs, budget=None):
    """The Lines of some runs, in the order of their first runs; a seed that comes twice is another line."""
    groups, found = {}, []
    for run in runs:
        settings = {key: value for key, value in flat(run.config).items() if key not in OWN}
        files = [run.about.get(key) for key in ("base_sha256", "method_sha256")]
        alike = groups.setdefault(json.dumps([settings, files], sort_keys=True), [])
        line = next((line for line in alike if run.config.run.seed not in line), None)
        if line is None:
            line = {}
            alike.append(line)
            found.append(line)
        line[run.config.run.seed] = run
    names = _short([run.source for run in runs])
    named = [{seed: names[run.source] for seed, run in line.items()} for line in found]
    return [
        Line(label, line, {seed: point(run, budget) for seed, run in line.items()}, own)
        for label, line, own in zip(_labels(named), found, named, strict=True)
    ]


def _short(sources):
    """{path of a run: the path without the directory that all lie in}."""
    paths = {source: Path(os.path.normpath(source.absolute())) for source in sources}
    common = os.path.commonpath([path.parent.parent if path.is_file() else path.parent for path in paths.values()])
    return {source: str(path.relative_to(common)) for source, path in paths.items()}


def _labels(named):
    """A label for each of [{seed: name of a run}], no two alike: the names' one, with a * where they differ."""
    labels = [_pattern(list(names.values())) for names in named]
    if len(set(labels)) < len(labels):
        labels = [first + f" and {len(others)} more" * bool(others) for first, *others in (n.values() for n in named)]
    again = [labels[:number].count(label) for number, label in enumerate(labels)]
    return [label + f" ({n + 1})" * bool(n) for label, n in zip(labels, again, strict=True)]


def _pattern(names):
    if len(names) == 1:
        return names[0]
    begin = len(os.path.commonprefix(names))  # of letters, not of folders
    end = len(os.path.commonprefix([name[begin:][::-1] for name in names]))
    return names[0][:begin] + "*" + names[0][len(names[0]) - end :]


def flat(config):
    """A configuration as {section.key: value}."""
    return configuration.flatten(config.plain())


def interval(values):
    """(mean, half of its 95 % confidence interval) of independent values; (None, None) if one is not known.

    Student's t with one degree of freedom less than values, that of 30 from there on; None for a single value.
    """
    if not values or any(value is None for value in values):
        return None, None
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    variance = math.fsum((value - mean) * (value - mean) for value in values) / (n - 1)
    return mean, T[min(n - 1, len(T)) - 1] * math.sqrt(variance / n)
