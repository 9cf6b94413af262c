"""Several runs beside each other: at equal rounds, bytes, tokens or seconds, over seeds, and what is incomparable."""

import csv
import io
import itertools
import json
import math
import re

import pytest
from conftest import within
from hypothesis import given, strategies as st
from synthetic import about, row, write_run

from gdmpi import checkpoint, compare, points, report
from gdmpi.errors import UserError


def falling(rounds, end=1.0, test=True, every=1, **others):
    """Rows whose loss falls by 1 a round to a last one of end, evaluated every so many rounds."""
    losses = [end + rounds - t if t % every == 0 or t == rounds else None for t in range(rounds + 1)]
    tests = [end + 0.5 if test and t == rounds else None for t in range(rounds + 1)]
    return [row(t, loss, test=held, **others) for t, (loss, held) in enumerate(zip(losses, tests, strict=True))]


@pytest.fixture
def write(tmp_path):
    """write(name, rows, *settings, known=None): a run's directory."""
    return lambda name, rows, *words, known=None: write_run(tmp_path / name, rows, *words, known=known)


def seeds(write, name, ends, *words):
    """Runs of seeds 0, 1, ... that end at these losses."""
    return [write(f"{name}-{n}", falling(4, end), f"run.seed={n}", *words) for n, end in enumerate(ends)]


def told(sources, budget=None):
    return json.loads(compare.show(sources, "json", budget and points.budget_of(budget))[0])


def test_the_servers_state_is_not_read(write, monkeypatch):
    run = write("a", falling(2))
    expected = report.summary(run)
    monkeypatch.setattr(checkpoint, "_get_arrays", pytest.fail)
    assert report.summary(run) == report.summary(run / "round-000002.h5") == expected
    assert report.load(run)[1].server == {}


# ---- where a run stands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "round"),
    [
        *[("rounds=3", 3), ("rounds=0", 0), ("rounds=99", 4), ("rounds=2.5", 2)],
        *[("bytes=12kB", 3), ("bytes=11.999kB", 2), ("bytes=12KB", 3), ("bytes=11.71875KiB", 3), ("bytes=12000", 3)],
        *[("tokens=2e2", 2), ("tokens=199", 1), ("seconds=6", 3), ("seconds=5.9", 2), ("bytes=1", 0), ("bytes=1TB", 4)],
    ],
)
def test_the_last_round_within_a_budget(write, budget, round):
    """A round is 2 clients with 1000 bytes each way, 100 tokens, 2 seconds."""
    (line,) = told([write("a", falling(4))], budget)["lines"]
    assert line["round"] == round and line["eval_loss"] == 5 - round
    assert (line["bytes"], line["tokens"], line["seconds"]) == (4000 * round, 100 * round, 2 * round)
    assert line["test_loss"] == (1.5 if round == 4 else None)
    assert line["tokens_per_second"] == (80 if round else None)


def test_costs_are_sums_over_the_rounds_and_memory_the_most(write):
    rows = falling(4)
    for t, each in enumerate(rows):
        each["peak_memory_client"], each["peak_memory_server"] = (3 - t) ** 2 * 10**6, 10**6
        each["flops_per_client"] = 2.0**t
    (line,) = told([write("a", rows)], "rounds=3")["lines"]
    assert (line["bytes_down_per_client"], line["bytes_up_per_client"]) == (3000, 3000)
    assert (line["flops_per_client"], line["seconds_train"], line["seconds_server"]) == (15, 3 * 1.25, 3 * 0.125)
    assert (line["peak_memory_client"], line["peak_memory_server"]) == (9 * 10**6, 10**6)
    text, _ = compare.show([write("b", rows), write("c", rows, "train.lr=1")], "text", points.budget_of("rounds=3"))
    heading, cells = next((a, b) for a, b in itertools.pairwise(text.splitlines()) if "FLOP/client" in a)
    found = dict(zip(re.split(r"  +", heading.strip()), re.split(r"  +", cells.strip()), strict=True))
    assert found == {"run": "b", "down/client": "3.0 kB", "up/client": "3.0 kB", "FLOP/client": "1.50e+01"} | {
        "train s": "3.8", "server s": "0.4", "client memory": "9.0 MB", "server memory": "1.0 MB"
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["rounds", "rounds=", "rounds=x", "laps=3", "tokens=1MB", "bytes=1XB", "rounds=-1", ""]
)
def test_budget_that_is_none(text):
    with pytest.raises(UserError, match="--at .*: not understood; give rounds=10"):
        points.budget_of(text)


def test_rounds_without_evaluation_are_passed_over(write):
    run = write("a", falling(5, every=3), "run.eval_every=3")
    assert [told([run], f"rounds={t}")["lines"][0]["round"] for t in range(6)] == [0, 0, 0, 3, 3, 5]


def test_run_without_validation_rows_stands_at_its_last_round(write):
    (line,) = told([write("a", [row(0, None), row(1, None, test=2.0)])])["lines"]
    assert (line["round"], line["eval_loss"], line["test_loss"]) == (1, None, 2.0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 100))
def test_what_was_spent_is_a_running_sum_and_a_budget_is_kept(clients, limit):
    rows = [row(t, 1.0, n if t else 0, size=1) for t, n in enumerate([0, *clients])]
    found = points.spent(rows)
    assert [at["bytes"] for at in found] == [2 * sum(clients[:t]) for t in range(len(rows))]
    run = report.Run(None, None, {}, rows, "")
    at = points.point(run, ("bytes", limit))
    assert at["bytes"] <= limit
    later = [total["bytes"] for total in found if total["rounds"] > at["round"]]
    assert all(total > limit for total in later)


# ---- over seeds -----------------------------------------------------------------------------------------------------


def simpson(f, a, b, n=2000):
    h = (b - a) / n
    return h / 3 * (f(a) + f(b) + sum((4 if k % 2 else 2) * f(a + k * h) for k in range(1, n)))


@pytest.mark.parametrize("freedom", range(1, 31))
def test_quantiles_leave_five_percent_outside(freedom):
    """By integrating Student's density, whatever table the quantiles are from."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    inside = 2 * simpson(lambda x: scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2), 0, points.T[freedom - 1])
    assert inside == pytest.approx(0.95, abs=5e-5)


def test_interval_of_an_example_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t of 2 degrees 4.303, so 4.303 / sqrt(3)."""
    assert points.interval([1, 2, 3]) == (2, pytest.approx(2.4843, abs=1e-4))
    assert points.interval([5.0]) == (5.0, None) and points.interval([1.0, None]) == (None, None)
    assert all(math.isnan(value) for value in points.interval([1.0, math.nan, 2.0]))
    many = [0.0, 1.0] * 50
    assert points.interval(many)[1] == pytest.approx(2.042 * math.sqrt(25 / 99 / 100))


def test_runs_that_differ_in_the_seed_are_a_line_with_paired_differences(write):
    a = seeds(write, "a", [1.0, 2.0, 3.0])
    b = seeds(write, "b", [1.5, 2.4, 3.6], "train.lr=2e-3")
    found = told([a[0], b[0], a[1], a[2], b[2], b[1]])
    first, second = found["lines"]
    assert first["run"] == "a-*" and first["seeds"] == [0, 1, 2] and first["adapter_sha256"] is None
    assert first["eval_loss"] == 2 and first["eval_loss_interval"] == pytest.approx(2.4843, abs=1e-4)
    assert second["eval_loss"] == pytest.approx(2.5) and second["test_loss"] == pytest.approx(3.0)
    (pair,) = found["paired"]
    assert sorted(pair["seeds"]) == [0, 1, 2]
    # 0.5, 0.4, 0.6: mean 0.5, standard deviation 0.1
    assert pair["eval_loss"] == pytest.approx(0.5) and pair["eval_loss_interval"] == pytest.approx(0.24843, abs=1e-5)
    assert found["differences"] == {"train.lr": [0.001, 0.002]} and found["warnings"] == []
    text = compare.show(a + b)[0]
    assert "2.0000 ± 2.4843*" in text and "+0.5000 ± 0.2484" in text and "over seeds (Student's t)" in text


def test_only_seeds_that_both_have_are_paired(write):
    a, b = seeds(write, "a", [1.0, 2.0, 3.0]), seeds(write, "b", [1.5, 2.5], "train.lr=2e-3")
    found = told([*a, *b])
    assert found["paired"][0]["seeds"] == [0, 1] and found["paired"][0]["eval_loss_interval"] == 0
    assert "drawn by other seeds" in found["warnings"][0]
    assert told([*a, b[0]])["paired"] == []


def test_other_rows_are_not_paired(write):
    a = seeds(write, "a", [1.0, 2.0])
    b = [write(f"b-{n}", falling(4), f"run.seed={n}", "data.validation=0.2") for n in range(2)]
    (pair,) = told([*a, *b])["paired"]
    assert pair["eval_loss"] is pair["eval_loss_interval"] is None and pair["test_loss"] == -0.5


def test_a_seed_that_comes_twice_is_no_further_sample(write):
    run = write("a", falling(2))
    lines = told([run, run])["lines"]
    assert [line["seeds"] for line in lines] == [[0], [0]] and lines[0]["eval_loss_interval"] is None


def test_nan_is_shown_and_never_dropped_from_a_mean(write):
    good, bad = seeds(write, "a", [1.0, math.nan])
    found = told([good, bad])
    assert math.isnan(found["lines"][0]["eval_loss"]) and found["best"] == {}
    assert "nan ± nan" in compare.show([good, bad])[0]
    assert "nan" in report.show(bad) and "nan" in compare.show([good, bad], "csv")[0]
    other = write("b", falling(4, 9.0), "train.lr=2e-3")
    assert told([good, bad, other])["best"].get("eval_loss") is None  # one number alone is not the best of anything


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        ([["x/a"]], ["a"]),
        ([["x/a"], ["x/b"]], ["a", "b"]),
        ([["x/a"], ["y/a"]], ["x/a", "y/a"]),
        ([["x/a-1", "x/a-2"], ["x/b"]], ["a-*", "b"]),
        ([["1/a", "2/a"], ["1/b", "2/b"]], ["*/a", "*/b"]),
        ([["x/a-1", "x/a-2"], ["x/a-3", "x/a-4"]], ["a-1 and 1 more", "a-3 and 1 more"]),
        ([["x/a"], ["x/b"], ["x/a"]], ["a", "b", "a (2)"]),
        ([["x/a"], ["x/a/round-000002.h5"]], ["a", "a/round-000002.h5"]),
        ([["x/a/round-000002.h5"]], ["a/round-000002.h5"]),
        ([["x/a/../b"], ["./x/c"]], ["b", "c"]),
    ],
)
def test_labels_are_short_and_differ(tmp_path, monkeypatch, paths, labels):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x" / "a").mkdir(parents=True)
    (tmp_path / "x" / "a" / "round-000002.h5").touch()
    names = points._short([points.Path(path) for line in paths for path in line])
    assert points._labels([{n: names[points.Path(path)] for n, path in enumerate(line)} for line in paths]) == labels


def test_run_in_the_working_directory_has_its_name(write, tmp_path, monkeypatch):
    a, b = write("a", falling(2)), write("b", falling(2), "train.lr=2e-3")
    monkeypatch.chdir(a)
    found = told([points.Path(), b])["lines"]
    assert [line["run"] for line in found] == ["a", "b"] and [line["runs"] for line in found] == [["."], [str(b)]]


# ---- differences and warnings ---------------------------------------------------------------------------------------


def test_settings_that_differ_are_listed_and_no_others(write):
    a, b = write("a", falling(2)), write("b", falling(2), "run.seed=3", "data.columns={prompt: q}", "train.lr=1e-2")
    found = told([a, b])["differences"]
    assert found == {"run.seed": [0, 3], "train.lr": [0.001, 0.01], "data.columns.prompt": [None, "q"]}
    lines = compare.show([a, b])[0].splitlines()
    assert [line.split() for line in lines if line.startswith("  train.lr")] == [["train.lr", "0.001", "|", "0.01"]]


def test_another_number_of_ranks_is_a_difference(write):
    a, b = write("a", falling(2)), write("b", falling(2), known=about(ranks=5))
    assert told([a, b])["differences"] == {"ranks": [3, 5]}


def changed(**data):
    known = about()
    known["data"] |= data
    return known


@pytest.mark.parametrize(
    ("known", "words", "says", "columns"),
    [
        (
            changed(rows=71),
            (),
            "other data (demo of 71 rows instead of demo of 70 rows)",
            "val loss, val ppl, test loss",
        ),
        (changed(), ("data.validation=0.2",), "other held-out rows", "val loss, val ppl cannot"),
        (changed(), ("data.test=0.2",), "other held-out rows", "val loss, val ppl, test loss, test ppl cannot"),
        (changed(), ("data.group=topic",), "other held-out rows", "val loss, val ppl, test loss, test ppl cannot"),
        (changed(), ("run.seed=1",), "drawn by other seeds", "val loss, val ppl, test loss, test ppl cannot"),
        (
            changed(test={"kept": 10, "tokens": 500, "target_tokens": 299}),
            ("model.name=x",),
            "another tokenizer",
            "test loss, test ppl cannot",
        ),
        (about(base_sha256="b" * 64), (), "another base model of the same name", "val loss, val ppl, test"),
        (about(processor="NVIDIA H200"), (), "on NVIDIA H200 instead of x86_64 AVX512", "tokens/s, seconds cannot"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line_and_not_marked(write, known, words, says, columns):
    a, b = write("a", falling(3)), write("b", falling(3, 0.5), "train.lr=2e-3", *words, known=known)
    (line,) = told([a, b])["warnings"]
    assert says in line and columns in line and line.startswith("b: ")
    marked = told([a, b])["best"]
    assert ("eval_loss" in marked) == ("val loss" not in line) and ("test_loss" in marked) == ("test loss" not in line)
    assert f"warning: {line}" in compare.show([a, b])[0]
    assert compare.show([a, b], "csv")[1] == [line]  # a table of numbers has no place for it


def test_same_rows_under_another_name_are_the_same_data(write):
    a, b = write("a", falling(3)), write("b", falling(3, 0.5), "data.name=elsewhere/demo.jsonl")
    assert told([a, b])["warnings"] == []
    assert told([a, b])["best"]["eval_loss"] == [1]


def test_another_quantisation_is_comparable(write):
    a, b = write("a", falling(3)), write("b", falling(3), "model.quantize=nf4", known=about(base_sha256="b" * 64))
    assert told([a, b])["warnings"] == []


def test_runs_with_nothing_in_common_are_refused(write):
    known = changed(name="x", rows=99) | {"base_sha256": "b" * 64}
    a, b = write("a", falling(3)), write("b", falling(3), "model.name=other", "data.name=x", known=known)
    with pytest.raises(
        UserError, match="nothing to compare: other data .* and model .other instead of demo."
    ) as caught:
        compare.show([a, b])
    assert "\n" not in str(caught.value)


def test_unequal_rounds_and_budgets_that_are_not_used_up_are_said(write):
    a, b = write("a", falling(2)), write("b", falling(4), "train.lr=2e-3")
    assert told([a, b])["warnings"] == ["not at the same round (2, 4): --at rounds=2 compares at an equal one"]
    assert told([a, b], "rounds=2")["warnings"] == []
    (line,) = told([a, b], "bytes=12kB")["warnings"]
    assert line == "a: over before bytes=12.0 kB"
    assert told([a, b], "bytes=11.9kB")["warnings"] == []  # a third round would not have fitted


def test_lines_that_no_round_of_is_within_the_budget_are_said_to_be_untrained(write):
    a, b = write("a", falling(2)), write("b", falling(2, size=100), "train.lr=2e-3")
    (line,) = told([a, b], "bytes=500")["warnings"]
    assert line == "a: at round 0, untrained: no evaluated round lies within bytes=500 B"
    every = write("c", falling(4, every=4), "train.lr=3e-3")
    assert told([a, every], "rounds=2")["warnings"] == [line.replace("a:", "c:").replace("bytes=500 B", "rounds=2")]
    assert told([a, b], "rounds=0")["warnings"] == []  # it is what was asked for
    assert (
        told([a, b], "bytes=400")["warnings"] == told([b, a], "bytes=400")["warnings"] == [line.replace("500", "400")]
    )
    large, small = (write(f"s-{n}", falling(2, size=10**n), f"run.seed={n}", "train.lr=5e-3") for n in (3, 2))
    other = write("s-1", falling(2), "run.seed=1", "train.lr=5e-3")
    warned = [told(runs, "bytes=500")["warnings"][-1] for runs in ([large, small, b], [large, other, b])]
    assert [each.partition(":")[0] for each in warned] == ["s-3", "s-*"]
    none = write("d", falling(0), "train.lr=4e-3")
    assert told([a, none], "bytes=4kB")["warnings"] == ["d: over before bytes=4.0 kB"]


def test_files_of_clients_are_counted_together(write):
    report_of = {"rows": 20, "train": {"kept": 10}, "validation": {"kept": 5, "target_tokens": 50}, "test": {}}
    known = about() | {"data": {"clients": [{"1": report_of}, {"0": report_of, "2": report_of}]}}
    words = ("clients.count=3", "clients.split={kind: files, files: 'x/*.jsonl'}")
    run = write("a", falling(2), *words, known=known)
    assert "the 150 response tokens of all 15 validation rows" in report.show(run)
    assert told([run, run])["warnings"] == []


# ---- how it is written ----------------------------------------------------------------------------------------------


def test_accuracies_have_intervals_and_are_paired_in_points(write):
    def runs(name, shares, *words):
        return [
            write(f"{name}-{n}", falling(2, eval_accuracy=share), f"run.seed={n}", *words)
            for n, share in enumerate(shares)
        ]

    sources = [*runs("a", (0.5, 0.6)), *runs("b", (0.75, 0.7), "train.lr=1e-2")]
    (pair,), half = told(sources)["paired"], points.interval([0.25, 0.1])
    assert [pair["eval_accuracy"], pair["eval_accuracy_interval"]] == pytest.approx(half)
    assert pair["test_accuracy"] is None
    text, _ = compare.show(sources)
    assert re.search(r"55.0% ± 63.5 .* 72.5% ± 31.8\*", text, re.S)  # t of one degree 12.706, times 5 and 2.5 points
    assert f"+17.5 ± {100 * half[1]:.1f}" in text and "val acc, points" in text and "test acc" not in text
    assert "accuracy's above 0 is better" in text


def test_formats_hold_the_same(write):
    a, b = write("a", falling(3)), write("b", falling(3, 0.5), "train.lr=2e-3")
    b = b.rename(b.parent / "b|c")  # a name that would break a table in markdown
    text, markdown, table = (compare.show([a, b], form)[0] for form in ("text", "markdown", "csv"))
    assert "0.5000*" in text and "**0.5000**" in markdown and "1.5000*" not in text and "*: best" in text
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = [line.replace("\\|", "").count("|") for line in lines]
    assert len(lines) == 8 and len({*widths[:4]}) == len({*widths[4:]}) == 1
    assert "- `train.lr`: 0.001 | 0.002" in markdown
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [float(line["eval_loss"]) for line in rows] == [1.0, 0.5]
    assert [line["train.lr"] for line in rows] == ["0.001", "0.002"] and rows[0]["run"] == "a"
    assert told([a, b])["best"] == {
        key: [1] for key in ("eval_loss", "eval_perplexity", "test_loss", "test_perplexity")
    }


def test_one_run_in_all_formats(write):
    run = write("a", falling(3))
    assert json.loads(report.show(run, "json")) == report.summary(run) == json.loads(report.as_json([run]))
    assert report.show(run, "csv") + "\n" == (run / "metrics.csv").read_text()
    assert [line.count("|") for line in report.show(run, "markdown").splitlines() if "|" in line] == [16] * 6
    assert "the 300 response tokens of all 10 validation rows" in report.show(run)


def test_accuracy_is_a_column_where_it_was_asked_for(write):
    a, b = write("a", falling(3)), write("b", falling(3, eval_accuracy=0.25), "train.lr=2e-3")
    c = write("c", falling(3, eval_accuracy=0.5), "train.lr=3e-3")
    assert "val acc" not in compare.show([a])[0] and "acc: share of the rows" in compare.show([a, b])[0]
    head, *rows = compare.show([a, b, c])[0].splitlines()[:4]
    place = head.split().index("acc")
    assert "val acc" in head and "test acc" not in head and place
    assert ["-" in rows[0].split(), "25.0%" in rows[1], "50.0%*" in rows[2]] == [True] * 3
    assert told([a, b, c])["best"] == {"eval_accuracy": [2]}


def test_a_method_is_said_with_what_it_trains_or_sends_and_pooled_rows_are_said_to_be(write):
    words = (["method.name=centralized"], ["model.adapter.kind=full"], ["exchange.what=merged"], ["method.name=fedavg"])
    runs = [write(f"r{n}", falling(2), *settings) for n, settings in enumerate(words)]
    rows = compare.show(runs)[0].splitlines()[1:5]
    assert [re.split(" {2,}", line)[1] for line in rows] == [
        *("centralized", "gradualdiff full", "gradualdiff merged", "fedavg")
    ]
    assert "5 pooled" in rows[0] and not any("pooled" in line for line in rows[1:])
    found = told(runs)["lines"]
    assert [line["method"] for line in found] == ["centralized", "gradualdiff", "gradualdiff", "fedavg"]
    assert {line["clients"] for line in found} == {5}
    assert "centralized on demo, 5 clients pooled (iid) on 3 ranks" in report.show(runs[0])
    assert "fedavg on demo, 5 clients (iid)" in report.show(runs[3])


def test_losses_of_clients_by_themselves_are_said_to_be_their_mean(write):
    a, b = write("a", falling(3)), write("b", falling(3, eval_clients={"0": 1.0, "1": 3.0}), "method.name=local")
    assert "b: its losses are the mean over its clients" in compare.show([a, b])[0]
    assert "mean over its clients" not in compare.show([a])[0]


def test_spending_is_marked_at_equal_rounds_only(write):
    a, b = write("a", falling(3)), write("b", falling(3, size=500), "train.lr=2e-3")
    assert told([a, b])["best"] == {"bytes": [1]}
    assert told([a, b], "rounds=2")["best"] == {"bytes": [1]}
    none = write("c", falling(3, size=0), "train.lr=3e-3")
    assert told([a, b, none])["best"] == {"bytes": [1]} and "bytes" not in told([a, none])["best"]
    note = "sent: 0 B is not marked"
    assert note in compare.show([a, b, none])[0] and note not in compare.show([a, b])[0]
    assert told([a, b], "bytes=8kB")["best"] == {"eval_loss": [1], "eval_perplexity": [1]}


def test_command_line(write):
    a, b = write("a", falling(3)), write("b", falling(3, 0.5), "train.lr=2e-3", known=about(processor="other"))
    assert [run["name"] for run in json.loads(within(["show", a, b, "--json"]).ok().out)] == ["a", "b"]
    shown = within(["show", a, b, "--at", "rounds=2", "--format", "csv"]).ok()
    assert shown.out.count("\n") == 3 and shown.err.startswith("warning: ") and shown.err.count("\n") == 1
    for words, says in (
        (["--json", "--at", "rounds=2"], "gdmpi: --at: --json gives whole runs"),
        (["--at", "rounds"], "gdmpi: --at rounds: not understood"),
        (["--json", "--format", "csv"], "not allowed with argument"),
    ):
        refused = within(["show", a, b, *words])
        assert refused.code == 2 and says in refused.err and "Traceback" not in refused.err
