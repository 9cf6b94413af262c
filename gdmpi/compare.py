"""Comparing runs: one table of them, what is best in it, how they differ, and what cannot be compared."""

import csv
import io
import itertools
import json
import math

from gdmpi import generate, hosting, points, record, report, results, words
from gdmpi.errors import UserError

SCORES = {  # over the held-out rows of a part
    "validation": ("eval_loss", "eval_perplexity", "eval_accuracy"),
    "test": ("test_loss", "test_perplexity", "test_accuracy"),
}
TEXTS = {  # of answers to held-out prompts, whatever the tokenizer
    "validation": tuple(f"eval_{name}" for name in points.GENERATED),
    "test": tuple(f"test_{name}" for name in points.GENERATED),
}
ALL_TEXTS = (*TEXTS["validation"], *TEXTS["test"])
SPEED = ("tokens_per_second", "seconds")
HIGHER = ("eval_accuracy", "test_accuracy", *ALL_TEXTS, "tokens_per_second")  # is better
TOKENS = "other tokens in the held-out rows (another tokenizer, template or data.max_length)"
SEEDS = "held-out rows drawn by other seeds"  # no doubt about pairs of runs with the same seed
HEADINGS = {
    "eval_loss": "val loss",
    "eval_perplexity": "val ppl",
    "eval_accuracy": "val acc",
    **dict(zip(TEXTS["validation"], ("val BLEU", "val ROUGE-L", "val chrF"), strict=True)),
    "test_loss": "test loss",
    "test_perplexity": "test ppl",
    "test_accuracy": "test acc",
    **dict(zip(TEXTS["test"], ("test BLEU", "test ROUGE-L", "test chrF"), strict=True)),
    "bytes": "sent",
    "tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
}
COSTS = dict(
    zip(
        points.COSTS,
        ("down/client", "up/client", "FLOP/client", "train s", "server s", "client memory", "server memory"),
        strict=True,
    )
)
SHARES = ("eval_accuracy", "test_accuracy")
PAIRED = ("eval_loss", "test_loss", *SHARES)  # told with their intervals, and seed by seed
ASKED = (*SHARES, *ALL_TEXTS)  # columns that are there if a run has asked for them
DIGITS = {"eval_loss": 4, "eval_perplexity": 2, "test_loss": 4, "test_perplexity": 2, "seconds": 1}
DIGITS |= dict.fromkeys(ALL_TEXTS, 2)


def show(sources, form="text", budget=None):
    """(the comparison of runs, warnings that found no place in it) as text, markdown, csv or json.

    budget: None, or what points.budget_of() gives. UserError if two runs have nothing in common.
    """
    lines = points.in_lines([report.read(source) for source in sources], budget)
    doubts = list(_doubts(lines))
    records, differ, paired = [_record(line) for line in lines], differences(lines), pairs(lines, doubts)
    columns = {
        key: name for key, name in HEADINGS.items() if key not in ASKED or any(r[key] is not None for r in records)
    }
    warnings = [
        f"{lines[number].label}: {why}: {', '.join(columns[key] for key in keys if key in columns)} cannot be compared"
        for number, why, keys in doubts
    ]
    warnings += _unequal(lines, budget)
    marked = best(records, {key for *_, keys in doubts for key in keys}, budget)
    if form == "csv":
        return _csv(records, differ), warnings
    if form == "json":
        found = {"at": dict([budget]) if budget else None, "lines": records, "best": marked, "differences": differ}
        return json.dumps(found | {"paired": paired, "warnings": warnings}, indent=1), []
    text = report.laid_out(form, *_table(form, columns, lines, records, marked))
    text += ["", *report.laid_out(form, *_cost_table(records))]
    if paired:
        text += ["", f"minus {lines[0].label}, seed by seed:", *([""] if form == "markdown" else [])]
        text += report.laid_out(form, *_paired_table(paired))
    if differ:
        text += ["", "settings that differ, in the order of the lines:", *([""] if form == "markdown" else [])]
        width = max(map(len, differ))
        for key, values in differ.items():
            said = " | ".join(_plain(value) for value in values)
            text.append(f"- `{key}`: {said}" if form == "markdown" else f"  {key:{width}}  {said}")
    notes = [*(f"warning: {line}" for line in warnings), *_meaning(form, lines, records, marked, paired, budget)]
    return "\n".join([*text, *report.notes(form, notes)]), []


# ---- what the numbers are worth -------------------------------------------------------------------------------------


def _doubts(lines):
    """(number of a line, why it cannot be compared with the first, the columns for which this holds)."""
    first = lines[0]
    for number, line in enumerate(lines[1:], 1):
        shared = next((seed for seed in first.runs if seed in line.runs), None)
        a, b = (first.first, line.first) if shared is None else (first.runs[shared], line.runs[shared])
        losses = tuple(key for keys in SCORES.values() for key in keys)
        if not _same_data(a, b):
            names = " instead of ".join(f"{_source(run)} of {_rows(run):,} rows" for run in (b, a))
            if a.config.model.name != b.config.model.name and a.about.get("base_sha256") != b.about.get("base_sha256"):
                other = f"data ({names}) and model ({b.config.model.name} instead of {a.config.model.name})"
                raise UserError(f"{first.label}, {line.label}: nothing to compare: other {other}; show them one by one")
            yield number, f"other data ({names})", losses + ALL_TEXTS
        else:
            reasons = {}
            for part, keys in SCORES.items():
                if why := _other_rows(a, b, part, set(first.runs) != set(line.runs)):
                    alike = why == TOKENS and report.counted(a.about, part)[0] == report.counted(b.about, part)[0]
                    reasons[why] = reasons.get(why, ()) + keys + (() if alike else TEXTS[part])
            yield from ((number, why, keys) for why, keys in reasons.items())
            asked = [(run.config.evaluation.generate, run.config.evaluation.new_tokens) for run in (a, b)]
            if asked[0] != asked[1] and asked[0][0] and asked[1][0]:
                yield number, "other prompts or answers (evaluation.generate, evaluation.new_tokens)", ALL_TEXTS
        same = all(
            getattr(a.config.model, key) == getattr(b.config.model, key) for key in ("name", "quantize", "dtype")
        )
        if same and a.about.get("base_sha256") != b.about.get("base_sha256"):
            yield number, "another base model of the same name", losses
        if a.about["processor"] != b.about["processor"]:
            yield number, f"on {b.about['processor']} instead of {a.about['processor']}", SPEED


def _same_data(a, b):
    """Whether two runs read the same rows: as many, from the same place, or with all the same counts."""

    def counts(run):
        return [report.counted(run.about, part) for part in ("train", "validation", "test")]

    return _rows(a) == _rows(b) and (_source(a) == _source(b) or counts(a) == counts(b))


def _rows(run):
    return sum(each["rows"] for each in report.reports(run.about))


def _source(run):
    split = run.config.clients.split
    return _plain(split.files) if split.kind == "files" else run.config.data.name


def _other_rows(a, b, part, other_seeds):
    """Why two runs' held-out rows of a part are not the same, or None."""
    data = [run.config.data for run in (a, b)]
    # the test rows are drawn first: the fraction for validation leaves them as they are
    keys = ("split_column", "group", "test", *(["validation"] if part == "validation" else []))
    if any(getattr(data[0], key) != getattr(data[1], key) for key in keys):
        return "other held-out rows"
    drawn = isinstance(getattr(data[0], part), float) and getattr(data[0], part) > 0
    if drawn and other_seeds:
        return SEEDS
    if report.counted(a.about, part) != report.counted(b.about, part):
        return TOKENS
    return None


def _unequal(lines, budget):
    """Lines of text on runs that have not come equally far."""
    rounds = sorted({at["round"] for line in lines for at in line.points.values()})
    if early := _called(lines, lambda at: at["ended"]):
        yield f"{early}: over before {budget[0]}={_amount(budget)}"
    idle = _called(lines, lambda at: not at["round"] and not at["ended"])
    if idle and budget not in (None, ("rounds", 0)):
        yield f"{idle}: at round 0, untrained: no evaluated round lies within {budget[0]}={_amount(budget)}"
    if len(rounds) > 1 and budget is None:
        said = ", ".join(map(str, rounds))
        yield f"not at the same round ({said}): --at rounds={rounds[0]} compares at an equal one"


def _called(lines, wanted):
    """The names of the runs whose points are wanted; a line's where all of its runs are."""
    found = []
    for line in lines:
        names = [line.names[seed] for seed, at in line.points.items() if wanted(at)]
        found += [line.label] if len(names) == len(line.names) else names
    return ", ".join(found)


def pairs(lines, doubts=()):
    """What each line's losses and accuracies are above the first line's, over two or more seeds that both have."""
    found = []
    for number, line in enumerate(lines[1:], 1):
        seeds = [seed for seed in lines[0].points if seed in line.points]
        if len(seeds) < 2:
            continue
        doubtful = {key for other, why, keys in doubts for key in keys if other == number and why != SEEDS}
        entry = {"run": line.label, "seeds": seeds}
        for key in PAIRED:
            both = [(line.points[seed][key], lines[0].points[seed][key]) for seed in seeds]
            known = key not in doubtful and all(None not in pair for pair in both)
            entry[key], entry[f"{key}_interval"] = points.interval([a - b for a, b in both] if known else [])
        found.append(entry)
    return found


def differences(lines):
    """{section.key: [value of each line]} of the settings, processors and ranks that differ between lines."""
    settings = [points.flat(line.first.config) for line in lines]
    for line, each in zip(lines, settings, strict=True):
        each["run.seed"] = sorted(line.runs) if len(line.runs) > 1 else line.first.config.run.seed
        each["ranks"] = line.first.about["ranks"]
        each["method_sha256"] = line.first.about.get("method_sha256")
    keys = [key for key in dict.fromkeys(itertools.chain(*settings)) if key not in points.OWN[:2]]
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def best(records, doubtful=(), budget=None):
    """{column: [numbers of the best lines]} of losses, speed, and at equal rounds what was spent."""
    columns = [key for keys in SCORES.values() for key in keys] + [*ALL_TEXTS, "tokens_per_second"]
    if len({each["round"] for each in records}) == 1:
        columns += [key for key in ("bytes", "seconds") if not budget or key != budget[0]]
    found = {}
    for key in columns:
        known = [each[key] for each in records if each[key] is not None and not math.isnan(each[key])]
        known = [value for value in known if value or key != "bytes"]  # a method that sends nothing saves nothing by it
        if key in doubtful or len(set(known)) < 2:
            continue
        top = max(known) if key in HIGHER else min(known)
        found[key] = [number for number, each in enumerate(records) if each[key] == top]
    return found


# ---- how it is written ----------------------------------------------------------------------------------------------


def _record(line):
    """A line as show --format json gives it."""
    stands = list(line.points.values())
    values = {key: points.interval([at[key] for at in stands]) for key in HEADINGS}
    costs = {key: points.interval([at[key] for at in stands])[0] for key in COSTS}
    return {
        "run": line.label,
        "runs": [str(run.source) for run in line.runs.values()],
        "seeds": list(line.runs),
        "method": line.first.config.method.name,
        "clients": line.first.config.clients.count,
        "rounds_planned": line.first.config.run.rounds,
        "rounds": [at["round"] for at in stands],
        "round": math.fsum(at["round"] for at in stands) / len(stands),
        **{name: v for key, pair in values.items() for name, v in zip((key, f"{key}_interval"), pair, strict=True)},
        **costs,
        "adapter_sha256": stands[0]["adapter_sha256"] if len(stands) == 1 else None,
    }


def _csv(records, differ):
    """A line of cells for each line, those of several seeds or paths parted by blanks, and the settings that differ."""
    text = io.StringIO()
    own = {key: [_plain(value) for value in values] for key, values in differ.items()}
    table = csv.DictWriter(text, [*records[0], *own], lineterminator="\n")
    table.writeheader()
    for number, each in enumerate(records):
        cells = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in each.items()}
        table.writerow(cells | {key: values[number] for key, values in own.items()})
    return text.getvalue().rstrip("\n")


def _table(form, values, lines, records, marked):
    seeds = any(len(each["seeds"]) > 1 for each in records)
    columns = ["run", *(["seeds"] if seeds else []), "method", "clients", "round", *values.values()]
    adapters = any(each["adapter_sha256"] for each in records)
    columns += ["/".join(dict.fromkeys(results.called(line.first.config) for line in lines))] * adapters
    rows = []
    for number, (line, each) in enumerate(zip(lines, records, strict=True)):
        low, high = min(each["rounds"]), max(each["rounds"])
        rows.append(
            [
                *[line.label, *([str(len(line.runs))] if seeds else []), line.method],
                f"{each['clients']}{' pooled' * hosting.pooled(line.first.config)}",
                f"{low}{f'-{high}' * (high > low)}/{each['rounds_planned']}",
                *(_cell(form, each, key, marked.get(key), number) for key in values),
                *[(each["adapter_sha256"] or "-")[:12]] * adapters,
            ]
        )
    return columns, rows


def _cell(form, each, key, best_lines, number):
    text = words.size(each[key]) if key == "bytes" else report.number(each[key], DIGITS.get(key, 0), ",")
    interval = each[f"{key}_interval"] if key in PAIRED else None
    if key in SHARES and each[key] is not None:
        text = f"{each[key]:.1%}" + (f" ± {100 * interval:.1f}" if interval is not None else "")
    elif interval is not None:
        text += f" ± {report.number(interval, DIGITS[key])}"
    chosen = best_lines and number in best_lines
    if form == "markdown":
        return f"**{text}**" if chosen else text
    return text + ("*" if chosen else " ") if best_lines else text


def _cost_table(records):
    """What a client and the server have sent, computed and held."""
    rows = []
    for each in records:
        cells = [each["run"]]
        for key in COSTS:
            if key.startswith("seconds"):
                cells.append(report.number(each[key], 1, ","))
            else:
                cells.append(f"{each[key]:.2e}" if key.startswith("flops") else words.size(each[key]))
        rows.append(cells)
    return ["run", *COSTS.values()], rows


def _paired_table(paired):
    rows, asked = [], [key for key in PAIRED if key not in SHARES or any(entry[key] is not None for entry in paired)]
    for entry in paired:
        cells = [entry["run"], str(len(entry["seeds"]))]
        for key in asked:
            many, digits = (100, 1) if key in SHARES else (1, DIGITS[key])
            pair = entry[key], entry[f"{key}_interval"]
            cells.append("-" if pair[0] is None else "{:+.{d}f} ± {:.{d}f}".format(*(many * x for x in pair), d=digits))
        rows.append(cells)
    return ["run", "seeds", *(HEADINGS[key] + ", points" * (key in SHARES) for key in asked)], rows


def _plain(value):
    return value if isinstance(value, str) else json.dumps(value)


def _amount(budget):
    return words.size(budget[1]) if budget[0] == "bytes" else f"{budget[1]:g}"


def _meaning(form, lines, records, marked, paired, budget):
    """Lines on what the numbers are."""
    first, about = lines[0], lines[0].first.about
    if marked:
        yield f"{'bold' if form == 'markdown' else '*'}: best of its column"
        if min(each["bytes"] for each in records) == 0 < max(each["bytes"] for each in records):
            yield "sent: 0 B is not marked: who sends nothing saves nothing by it"
    if any(len(each["seeds"]) > 1 for each in records):
        yield "mean ± half of its 95 % confidence interval, over seeds (Student's t)"
    if paired:
        points_too = ", accuracy's above 0" * any(entry[key] is not None for entry in paired for key in SHARES)
        yield f"minus {first.label}: what is below 0{points_too} is better; an interval that holds 0 may be chance"
    at = f", the last evaluated one within {budget[0]}={_amount(budget)}" if budget else ", the last evaluated one"
    yield f"round: where the line stands{at}, of those planned; all columns are of it and what came before"
    val, test = (report.held_out(about, part) for part in SCORES)
    whose = f" ({next(iter(first.names.values()))}; others with other seeds)" if len(first.runs) > 1 else ""
    yield f"val: mean loss over {val}; test: over {test}{whose}"
    for line in lines:
        if hosting.scattered(line.first.config) and any(row["eval_clients"] for row in line.first.rows):
            yield f"{line.label}: its losses are the mean over its clients, each with what it has trained itself"
    if any(each[key] is not None for each in records for key in SHARES):
        yield "acc: share of the rows whose true label is likelier than any other"
    for line in lines:
        for part, scores in record.generated(line.first.rows[-1]).items():
            yield f"{line.label}: {generate.said(scores, part, line.first.config.evaluation.new_tokens)}"
    yield "ppl: exponential of the loss a token; it cannot be compared across tokenizers"
    yield "sent: up and down of all clients of all rounds so far; tokens: response tokens that they trained on"
    yield "down, up, FLOP: of one client in all rounds so far, FLOP as counted; memory: the most that a process held"
    yield "tokens/s: tokens over the slowest rank's training; seconds: of the rounds so far, without the start"
