"""Figures: what they are made of, that they can be drawn from whatever a run holds, and what is wrong input."""

import json
import math
import sys

import pytest
from conftest import launch
from synthetic import about, row, write_run

from gdmpi import plot, points, report
from gdmpi.errors import UserError


@pytest.fixture
def write(tmp_path):
    """write(name, losses, *settings, known=None, **of each row): a run's directory."""

    def make(name, losses, *words, known=None, **others):
        rows = [row(t, loss, **others) for t, loss in enumerate(losses)]
        return write_run(tmp_path / name, rows, *words, known=known)

    return make


def lines_of(*runs):
    return points.in_lines([report.read(run) for run in runs])


def drawn(*runs):
    """The figure of some runs, drawn once, so that nothing in it is left to be computed."""
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(plot.STYLE):
        figure = plot.figure(lines_of(*runs))
        FigureCanvasAgg(figure).draw()
    return figure


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_curve_is_the_mean_over_seeds_between_lowest_and_highest(write):
    """Round t has cost 4000 t bytes, 100 t tokens, 2 t seconds."""
    a, b = write("a", [4.0, 2.0, 1.0]), write("b", [5.0, 3.0, 3.0], "run.seed=1")
    (line,) = lines_of(a, b)
    assert [(at["value"], at["low"], at["high"]) for at in plot.curve(line)] == [(4.5, 4, 5), (2.5, 2, 3), (2, 1, 3)]
    last = plot.curve(line)[2]
    assert [last[key] for key in points.BUDGETS] == [2, 8000, 200, 4]


def test_curve_passes_over_rounds_without_evaluation_and_keeps_nan(write):
    (line,) = lines_of(write("a", [4.0, None, 2.0, math.nan, math.inf, 1.0]))
    found = plot.curve(line)
    assert [at["rounds"] for at in found] == [0, 2, 3, 4, 5]
    assert [math.isnan(at["value"]) for at in found] == [False, False, True, True, False]
    pair = lines_of(write("b", [4.0, math.nan]), write("c", [4.0, 1.0], "run.seed=1"))
    assert math.isnan(plot.curve(pair[0])[1]["value"])


@pytest.mark.parametrize("rounds", [1, 39, 40, 41, 1000])
def test_bins_are_means_of_as_many_rounds_as_it_takes(rounds):
    spans, means = plot.binned([{"x": float(t), "checkpoint": 2.0 * (t < rounds)} for t in range(1, rounds + 1)])
    assert len(spans) <= plot.BARS and spans[0][0] == 1 and spans[-1][1] == rounds
    assert all(a[1] + 1 == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert [each["x"] for each in means] == [(a + b) / 2 for a, b in spans]
    # the last round's file does not hold how long it took to write
    known = [each["checkpoint"] for each in means if not math.isnan(each["checkpoint"])]
    assert set(known) <= {2.0} and len(known) == len(means) - (spans[-1][0] == rounds)


def test_many_values_of_a_column_are_added_up_as_others():
    split = {"column": "topic", "values": list("abcdefghij"), "rows": [[10 - n for n in range(10)], [1] * 10]}
    columns = plot._columns(split)
    assert list(columns) == [*"abcdefg", "others"] and columns["others"] == [3 + 2 + 1, 3]
    assert [sum(each) for each in zip(*columns.values(), strict=True)] == [55, 10]


def test_panels_of_one_run_hold_its_numbers(write):
    figure = drawn(write("a", [4.0, 2.0, math.nan, 1.0], size=10**6))
    rounds, sent, seconds, time, load, rows = figure.axes
    assert list(rounds.lines[0].get_xdata()) == [0, 1, 2, 3] and "nan" in rounds.get_title()
    assert list(sent.lines[0].get_xdata()) == [0, 4, 8, 12] and "(MB)" in sent.get_xlabel()
    assert list(seconds.lines[0].get_xdata()) == [0, 2, 4, 6] and "(s)" in seconds.get_xlabel()
    parts = [text.get_text().strip() for text in time.get_legend().get_texts()]
    assert parts[:5] == ["training", "exchange", "server", "evaluation", "other"] and "checkpoint" in parts[5]
    # 1.25 + 0.25 + 0.125 + 0.25 of 2 seconds, so 0.125 are other; 0.5 of checkpoint beside them
    tops = [patch.get_data().values[0] for patch in time.patches]
    assert tops == [1.25, 1.5, 1.625, 1.875, 2.0] and list(time.lines[0].get_ydata()) == [0.5] * 3
    assert [patch.get_data().values[0] for patch in load.patches] == [2, 4]
    assert list(rows.patches[0].get_data().values[::2]) == [30, 20]
    assert "demo" in figure.get_suptitle()


def test_values_of_a_column_are_not_read_as_markup(write):
    names = ["_hidden", "$x", "y$"]
    panel = drawn(write("a", [4.0, 2.0], known=by_topic(2, names))).axes[-1]
    shown = [text.get_text().strip().replace("\\$", "$") for text in panel.get_legend().get_texts()]
    assert shown == names


def test_lines_differ_without_colour(write):
    runs = [write(f"run{n}", [3.0, 2.0], f"train.lr=1e-{n}") for n in range(1, 9)]
    figure = drawn(*runs)
    looks = {(line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 8
    (legend,) = figure.legends
    assert [text.get_text().split()[0] for text in legend.get_texts()] == [str(n) for n in range(1, 9)]
    assert len({plot.style(n)["marker"] + str(plot.style(n)["linestyle"]) for n in range(55)}) == 55


def test_a_legend_tells_methods_only_where_they_differ(write):
    def legend(*runs):
        return [text.get_text() for text in drawn(*runs).legends[0].get_texts()]

    a = [write(f"a-seed{n}", [3.0, 2.0], f"run.seed={n}") for n in range(2)]
    b, c = write("b", [3.0, 2.0], "train.lr=0.5"), write("c", [3.0, 2.0], "method.name=local")
    assert legend(*a, b) == ["1  a-seed* (mean of 2 seeds)", "2  b"]
    assert legend(*a, c) == ["1  a-seed* (gradualdiff, mean of 2 seeds)", "2  c (local)"]
    (run,) = lines_of(write("d", [3.0, 2.0], "method.name=centralized"))
    assert drawn(run.first.source).get_suptitle() == "d: centralized on demo, 5 clients pooled"


def overlapping(figure):
    """Pairs of texts of a figure that lie on each other, and texts that leave it."""
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        if axes.axison:
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = axis.get_view_interval()
                texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    found = [
        (a.get_text(), b.get_text())
        for n, (a, box) in enumerate(zip(texts, boxes, strict=True))
        for b, other in zip(texts[:n], boxes, strict=False)
        if box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9))
    ]
    outside = [
        text.get_text()
        for text, box in zip(texts, boxes, strict=True)
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    ]
    return found, outside


def by_topic(clients, names):
    known = about(tuple(len(names) + n for n in range(clients)))
    rows = [[1 + n] + [1] * (len(names) - 1) for n in range(clients)]
    return known | {"data": known["data"] | {"split": {"column": "topic", "values": names, "rows": rows}}}


def test_nothing_lies_on_anything_else(write):
    runs = [write(f"a-rather-long-name-of-a-run-{n}", [3.0, 2.0], f"train.lr=1e-{n}") for n in range(1, 6)]
    topics = ["anxiety", "depression", "relationships", "trauma and loss", "work"]
    for case in (
        [write("one", [4.0, 2.0])],
        [write("nan", [4.0, math.nan, 1.0])],
        [write("untrained", [4.0])],
        [write("unevaluated", [None, None])],
        [write("topics", [4.0, 2.0], known=by_topic(5, topics))],
        [write("many", [1000.0, *(2.0 for _ in range(100))], known=about(tuple(range(1, 51))))],
        [write("x" * 200, [4.0, 2.0])],
        runs,
        [*runs, write("other", [4.0, 2.0], "clients.count=3", known=by_topic(3, ["a", "b"]))],
    ):
        assert overlapping(drawn(*case)) == ([], []), case


@pytest.mark.parametrize(("count", "rows"), [(2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (6, [3, 3]), (7, [3, 2, 2])])
def test_no_panel_lies_alone_in_a_row(count, rows):
    assert plot.in_rows(count) == rows
    assert all(plot.in_rows(n) and min(plot.in_rows(n)) > 1 and sum(plot.in_rows(n)) == n for n in range(2, 40))


def test_panels_fill_their_rows_and_what_has_nothing_to_show_has_none(write):
    """Rows of panels by their titles: where nothing is sent, where nothing is evaluated, with two splits."""

    def places(*runs):
        rows = {}
        for axes in drawn(*runs).axes:
            rows.setdefault(round(axes.get_subplotspec().get_position(axes.figure).y0, 3), []).append(axes.get_title())
        return list(rows.values())

    losses = [f"validation loss over {what}" for what in ("rounds", "bytes", "seconds")]
    time, sent, split = "time of a round", "bytes of a round, all clients", "training rows"
    one, other = write("one", [4.0, 2.0]), write("other", [4.0, 2.0], known=about((5, 5, 5)))
    assert places(one) == [losses, [time, sent, split]]
    assert places(write("alone", [4.0, 2.0], size=0)) == [[losses[0], losses[2]], [time, split]]
    assert places(write("unscored", [None, None])) == [[losses[0], time], [sent, split]]
    shares = write("answered", [4.0, 2.0], "evaluation.labels=[a, b]", eval_accuracy=0.5)
    assert places(shares)[0] == [title.replace("loss", "accuracy") for title in losses]
    assert places(shares, one)[0] == losses
    assert places(one, other) == [losses, [time, sent], [f"{split} of 1", f"{split} of 2"]]


def test_several_lines_are_bars_of_their_mean_round(write):
    lines = [[4.0, 2.0, 1.0], [4.0], [4.0, 2.0]]
    time, sent = drawn(
        *(
            write(f"r{n}", losses, f"run.seed={n}", f"train.lr=1e-{n + 1}", size=10**6 * (n + 1))
            for n, losses in enumerate(lines)
        )
    ).axes[3:5]
    # the second has no round
    assert [bool(x) for x in time.patches[0].get_data().values[::2] > 0] == [True, False, True]
    assert [list(patch.get_data().values[::4]) for patch in sent.patches] == [[2, 6], [4, 12]]
    assert list(time.lines[0].get_ydata())[::2] == [0.5, 0.5]


def test_splits_are_drawn_once_each(write):
    runs = [write(f"r{n}", [4.0, 2.0], f"train.lr=1e-{n + 1}", known=about((n // 2 + 1, 2))) for n in range(10)]
    titles = [axes.get_title() for axes in drawn(*runs).axes]
    assert titles[5:] == [f"training rows of {2 * n + 1}, {2 * n + 2}" for n in range(3)] + [
        "training rows of 7, 8; 1 more splits are not shown"
    ]


# ---- files and words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_equal_runs_give_equal_files(write, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    run = write("a", [4.0, 2.0], known=by_topic(2, ["x", "y"]))
    files = [tmp_path / f"{n}{suffix}" for n in range(2)]
    for file in files:
        assert plot.plot([run], file) == [f"figure of a: {file}"]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert first.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])


def test_wrong_input_is_one_line(write, tmp_path):
    pytest.importorskip("matplotlib")
    run = write("a", [4.0, 2.0])
    with pytest.raises(UserError, match="unknown kind of figure; known are .png .pdf .svg"):
        plot.plot([run], tmp_path / "a.jpeg")
    with pytest.raises(UserError, match="there is no such run directory"):
        plot.plot([tmp_path / "nowhere"], tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be written: No such file"):
        plot.plot([run], tmp_path / "nowhere" / "a.png")


def test_missing_matplotlib_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'gdmpi\[plot\]'"):
        plot.plot([tmp_path / "nowhere"], tmp_path / "a.png")


# ---- speed ----------------------------------------------------------------------------------------------------------

COMMANDS = """
import json, sys, time
from gdmpi.__main__ import main
assert main(json.loads(sys.argv[1])) == 0
assert not {"torch", "transformers", "datasets", "mpi4py.MPI"} & set(sys.modules)
print(f"\\n{time.process_time():.3f}")  # that of the start, too; waiting for others on a busy machine does not count
"""


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The directory of a run of 1,000 rounds with 20 clients each."""
    rows = [row(t, 1 + 3 / (t + 1), clients=20, test=1.0 if t == 1000 else None) for t in range(1001)]
    return write_run(tmp_path_factory.mktemp("long") / "run", rows, "clients.count=20", known=about((5,) * 20))


@pytest.mark.parametrize(
    "words",
    [["show"], ["show", "--json"], ["show", "--at", "bytes=1MB"], ["verify"], ["plot", "-o", "long.png"]],
    ids=" ".join,
)
def test_a_thousand_rounds_are_read_quickly_and_without_torch(long, tmp_path, words):
    if words[0] == "plot":
        pytest.importorskip("matplotlib")
    taken = []
    while not taken or (taken[-1] >= 2 and len(taken) < 3):  # neighbours slow caches and cores down
        result = launch([json.dumps([*words, str(long)])], program=("-c", COMMANDS), cwd=tmp_path).ok()
        taken.append(float(result.out.split()[-1]))
    assert min(taken) < 2
