"""Figures of runs: losses or accuracies over what they cost, where the time and the bytes went, who has which rows."""

import functools
import math

from gdmpi import points, report
from gdmpi.errors import UserError

SUFFIXES = (".png", ".pdf", ".svg")
# Legible in grey: from dark to light, and no two neighbours share a dash or a marker
COLOURS = ("#000000", "#b2182b", "#2166ac", "#e08214", "#4d9221", "#8073ac", "#878787")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX*<>h"
FILLS = ("#3b3b3b", "#c7c7c7", "#787878", "#efefef", "#a0a0a0", "#5a7ca8", "#d9b48f", "#8fb08c")
HATCHES = ("", "///", "...", "xxx", "", "\\\\\\", "+++", "ooo")
PARTS = {"train": "training", "exchange": "exchange", "server": "server", "eval": "evaluation", "other": "other"}
COSTS = {  # of a round: title, axis, parts
    "seconds": ("time of a round", "time", PARTS),
    "bytes": ("bytes of a round, all clients", "sent", {"up": "up", "down": "down"}),
}
SPLITS = 4  # that have a panel
BARS = 40  # in a panel; more rounds than that are drawn as means of as many as it takes
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 150,
    "svg.hashsalt": "gdmpi",
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "agg.path.chunksize": 10_000,
}
UNDATED = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # equal runs give equal files


def plot(sources, out):
    """Draw some runs into a file, whose suffix says how; returns lines on what was done.

    Runs that differ in nothing but the seed are one curve, their mean, in a band from the lowest to the highest.
    UserError for another suffix, where matplotlib is missing, and for a file that cannot be written.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: unknown kind of figure; known are {' '.join(SUFFIXES)}")
    try:
        import matplotlib
    except ImportError:
        raise UserError("plot: matplotlib is not installed; pip install 'gdmpi[plot]'") from None
    lines = points.in_lines([report.read(source) for source in sources])
    with matplotlib.rc_context(STYLE):
        try:
            figure(lines).savefig(out, metadata=UNDATED[out.suffix])
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return [f"figure of {', '.join(line.label for line in lines[:3])}{' and others' * (len(lines) > 3)}: {out}"]


def figure(lines):
    """A matplotlib Figure of points.Lines."""
    from matplotlib.figure import Figure

    labels = all(run.config.evaluation.labels for line in lines for run in line.runs.values())
    score = "eval_accuracy" if labels else "eval_loss"
    curves, costs, splits = [curve(line, score) for line in lines], [_rounds(line) for line in lines], _splits(lines)
    sent = any(each["up"] or each["down"] for rounds in costs for each in rounds)
    over = ["rounds", *["bytes"] * sent, "seconds"] if any(curves) else ["rounds"]
    draw = [functools.partial(_curves, score=score, lines=lines, curves=curves, what=what) for what in over]
    draw += [functools.partial(_cost, costs=costs, what=what) for what in ("seconds", *["bytes"] * sent)]
    for number, (rows, split, numbers) in enumerate(splits[:SPLITS], 1):
        whose = "" if len(splits) == 1 else f" of {', '.join(map(str, numbers))}"
        left = len(splits) - SPLITS if number == SPLITS else 0
        whose += f"; {left} more splits are not shown" if left > 0 else ""
        draw.append(functools.partial(_split, rows=rows, split=split, whose=whose))
    rows = in_rows(len(draw))
    heights = [1.15, *[1] * (len(rows) - 1)]
    made = Figure(figsize=(11, 3.1 * sum(heights) + 0.4), layout="constrained")
    grid = made.add_gridspec(len(rows), 1, height_ratios=heights)
    places = [place for row, count in zip(grid, rows, strict=True) for place in row.subgridspec(1, count)]
    panels = [made.add_subplot(place) for place in places]
    for panel, paint in zip(panels, draw, strict=True):
        paint(panel)
    for panel in panels[1 : len(over)]:
        panel.sharey(panels[0])
    _head(made, lines)
    return made


def in_rows(count):
    """How many of so many panels, two or more, lie in each row: three or two, so that none lies alone."""
    twos = -count % 3
    return [3] * ((count - 2 * twos) // 3) + [2] * twos


def style(number):
    """The colour, dashes and marker of a line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _head(made, lines):
    """What is drawn: a title for one line, a legend for several."""
    from matplotlib.lines import Line2D

    names = [_name(line, len({line.method for line in lines}) > 1) for line in lines]
    if len(lines) == 1:
        config = lines[0].first.config
        made.suptitle(f"{names[0]}: {lines[0].method} on {config.model.name}, {report.clients(config)}")
        return
    handles = [Line2D([], [], label=f"{n + 1}  {name}", **style(n)) for n, name in enumerate(names)]
    columns = max(1, min(4, 130 // (max(map(len, names)) + 12)))
    made.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=4, fontsize=9)


def _name(line, tell_method):
    """What a line is called in a figure."""
    more = [line.method] * tell_method + [f"mean of {len(line.runs)} seeds"] * (len(line.runs) > 1)
    label = f"…{line.label[-90:]}" if len(line.label) > 91 else line.label
    return _literal(f"{label} ({', '.join(more)})" if more else label)


# ---- scores ---------------------------------------------------------------------------------------------------------


SCORES = {  # the word for it, axis
    "eval_loss": ("loss", "loss per response token (nats)"),
    "eval_accuracy": ("accuracy", "share of rows whose likeliest label is right"),
}


def curve(line, score="eval_loss"):
    """A line's validation scores as [{"rounds", "bytes", "tokens", "seconds", "value", "low", "high"}].

    Of the rounds that all its runs have evaluated; means over the runs, of the score with the lowest and the highest. A
    score that is not finite makes all three nan.
    """
    runs = [
        {
            row["round"]: {**total, "value": row[score]}
            for row, total in zip(run.rows, points.spent(run.rows), strict=True)
            if row[score] is not None
        }
        for run in line.runs.values()
    ]
    found = []
    for t in sorted(set.intersection(*map(set, runs))):
        each = [run[t] for run in runs]
        scores = [at["value"] for at in each]
        point = {key: math.fsum(at[key] for at in each) / len(each) for key in points.BUDGETS}
        values = (math.fsum(scores) / len(scores), min(scores), max(scores))
        values = values if all(map(math.isfinite, scores)) else (math.nan,) * 3
        found.append(point | dict(zip(("value", "low", "high"), values, strict=True)))
    return found


def _curves(panel, score, lines, curves, what):
    """The lines' curves over rounds, bytes or seconds (what)."""
    unit, size = _unit(what, max((at[what] for drawn in curves for at in drawn), default=0))
    word, axis = SCORES[score]
    title = f"validation {word} over {what}"
    for number, drawn in enumerate(curves):
        xs, look = [at[what] / size for at in drawn], style(number)
        every = max(1, len(drawn) // 12)
        panel.plot(xs, [at["value"] for at in drawn], markevery=every, **look)
        if len(lines[number].runs) > 1:
            low, high = ([at[key] for at in drawn] for key in ("low", "high"))
            panel.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
        lost = [x for x, at in zip(xs, drawn, strict=True) if math.isnan(at["value"])]
        if lost:
            top = panel.get_xaxis_transform()
            panel.plot(lost, [0.97] * len(lost), "x", color=look["color"], markersize=6, transform=top)
            title += " (×: nan)" * ("×" not in title)
    if not any(curves):
        _say(panel, "no validation rows")
    panel.set_title(title)
    panel.set_xlabel(
        {"rounds": "round", "bytes": f"sent up and down, all clients ({unit})"}.get(what, f"time ({unit})")
    )
    panel.set_ylabel(axis if what == "rounds" else "")
    if what == "rounds":
        _whole(panel.xaxis)
    panel.margins(y=0.08)


# ---- time and bytes -------------------------------------------------------------------------------------------------


def _rounds(line):
    """[{part: seconds, "up", "down": bytes}] of the rounds that all runs of a line have done: means over the runs."""
    found = []
    for rows in zip(*(run.rows[1:] for run in line.runs.values()), strict=False):
        means = {part: _mean(row["seconds"][part] for row in rows) for part in rows[0]["seconds"]}
        means["other"] = max(0.0, means["total"] - sum(means[part] for part in PARTS if part != "other"))
        for way in ("up", "down"):
            means[way] = _mean(row["clients"] * row[f"bytes_{way}_per_client"] for row in rows)
        found.append(means)
    return found


def _mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def binned(rounds, most=BARS):
    """([(first round, last round)], [means of that many rounds]) in at most so many bins of equal width."""
    wide = max(1, -(-len(rounds) // most))
    spans = [(start + 1, min(start + wide, len(rounds))) for start in range(0, len(rounds), wide)]
    means = [{key: _mean(each[key] for each in rounds[a - 1 : b]) for key in rounds[0]} for a, b in spans]
    for (a, b), each in zip(spans, means, strict=True):
        # a round file cannot hold how long it takes to write itself: of a run's last round that is not known
        known = [each["checkpoint"] for each in rounds[a - 1 : b] if each["checkpoint"] > 0]
        each["checkpoint"] = _mean(known) if known else math.nan
    return spans, means


def _cost(panel, costs, what):
    """Stacked bars of what a round took, in seconds or bytes: of one line's rounds, or of several lines their mean."""
    title, label, parts = COSTS[what]
    panel.set_title(title)
    if not any(costs):
        _say(panel, "no round yet")
        return
    if len(costs) == 1:
        spans, means = binned(costs[0])
        panel.set_xlabel(f"round{_wide(spans)}")
    else:
        spans = [(number, number) for number in range(1, len(costs) + 1)]
        nothing = dict.fromkeys((*parts, "checkpoint"), math.nan)
        means = [binned(rounds, 1)[1][0] if rounds else nothing for rounds in costs]
        panel.set_xlabel("line of the legend (mean over its rounds)")
    saving = [each["checkpoint"] for each in means] if what == "seconds" else []
    tops = [*(sum(each[part] for part in parts) for each in means), *saving]
    unit, size = _unit(what, max(top for top in tops if not math.isnan(top)))
    _stacked(panel, spans, {said: [each[part] / size for each in means] for part, said in parts.items()})
    if saving:
        centres, heights = [(a + b) / 2 for a, b in spans], [each / size for each in saving]
        marker = {"color": "black", "markerfacecolor": "white", "markersize": 3.5}
        panel.plot(centres, heights, "D", label="checkpoint, meanwhile", **marker)
    panel.set_ylabel(f"{label} ({unit})")
    _below(panel)


def _wide(spans):
    rounds = spans[0][1] - spans[0][0] + 1
    return f" (means of {rounds})" if rounds > 1 else ""


# ---- who has which rows ---------------------------------------------------------------------------------------------


def _splits(lines):
    """[(rows of each client, the split by a column or None, [numbers of the lines that have it])], without doubles."""
    found = []
    for number, line in enumerate(lines, 1):
        about = line.first.about
        rows = [about["rows"][client] for client in sorted(about["rows"], key=int)]
        split = about["data"].get("split")
        same = next((entry for entry in found if entry[:2] == (rows, split)), None)
        if same:
            same[2].append(number)
        else:
            found.append((rows, split, [number]))
    return found


def _split(panel, rows, split, whose):
    spans = [(client, client) for client in range(len(rows))]
    if split:
        _stacked(panel, spans, _columns(split))
        _below(panel)
        panel.set_title(f"training rows by {_literal(split['column'])}{whose}")
    else:
        _stacked(panel, spans, {"": rows})
        panel.set_title(f"training rows{whose}")
    panel.set_xlabel("client")
    panel.set_ylabel("rows")


def _columns(split):
    """{value: rows of each client}: where too many to tell apart, those with most rows and others."""
    columns = dict(zip(map(str, split["values"]), map(list, zip(*split["rows"], strict=True)), strict=True))
    if len(columns) <= len(FILLS):
        return columns
    most = sorted(columns, key=lambda value: -sum(columns[value]))[: len(FILLS) - 1]
    others = [value for value in columns if value not in most]
    shown = {value: columns[value] for value in columns if value in most}
    return shown | {"others": [sum(each) for each in zip(*(columns[value] for value in others), strict=True)]}


# ---- drawing --------------------------------------------------------------------------------------------------------


def _stacked(panel, spans, stacks):
    """Bars over spans of whole numbers, stacked: {label: heights}. One patch a label, however many bars."""
    import numpy as np

    gap = 0.12 if len(spans) <= 60 else 0.0
    edges = np.array([(a - 0.5 + gap * (b - a + 1), b + 0.5 - gap * (b - a + 1)) for a, b in spans]).ravel()
    floor = np.zeros(len(spans))
    for number, (label, heights) in enumerate(stacks.items()):
        top = floor + np.array(heights, float)
        between = np.full(len(spans), np.nan)
        values, base = (np.column_stack([each, between]).ravel()[:-1] for each in (top, floor))
        panel.stairs(
            *(values, edges),
            baseline=base,
            fill=True,
            facecolor=FILLS[number] if len(stacks) > 1 else FILLS[2],
            edgecolor="black",
            linewidth=0.5 if gap else 0.0,
            hatch=HATCHES[number] if len(stacks) > 1 else None,
            label=f" {_literal(label)}" if label else None,  # without the blank one that begins with _ would be hidden
        )
        floor = top
    panel.set_xlim(spans[0][0] - 0.7, spans[-1][1] + 0.7)
    panel.set_ylim(bottom=0)
    panel.grid(axis="x", visible=False)
    _whole(panel.xaxis)


def _literal(text):
    """A text in which $ begins no formula."""
    return text.replace("$", r"\$")


def _below(panel):
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, handlelength=1.6, columnspacing=1.2)


def _whole(axis):
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _say(panel, text):
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#555555")


def _unit(what, most):
    """(unit, its size) in which numbers up to most are read easily."""
    if what == "rounds":
        return "", 1
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    least = 1
    if what == "seconds":
        units, least = {"s": 1, "min": 60, "h": 3600}, 5
    return next(
        ((unit, size) for unit, size in reversed(units.items()) if most >= least * size), next(iter(units.items()))
    )
