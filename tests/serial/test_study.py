"""The comparisons in configs/: which runs they start, which learning rates they choose, and what if a run fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gdmpi import config as configuration

STUDY, COMPARE = ROOT / "configs" / "paper" / "study.sh", ROOT / "configs" / "frameworks" / "compare.sh"
# instead of Python: notes what gdmpi is called with, and answers as the files beside it say
STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exec {python} -SE "$@"; fi
shift 2
(IFS=$'\\t' && echo "$*" >>{place}/calls)
case $1 in
  run)
    name=$(printf '%s\\n' "$@" | sed -n 's/^run.name=//p')
    echo "words of $name"
    ! grep -qx "$name" {place}/failing ;;
  show)
    case "$2 $3" in
      --json*) cat "{place}/$(basename "$3").json" ;;
      "--format json") echo '{{"lines": [{{"bytes": 9}}, {{"bytes": 5}}]}}' ;;
      *) echo "| a table |" ;;
    esac ;;
esac
"""


@pytest.fixture
def out(tmp_path):
    """Where the study's runs, tables and figures go."""
    return tmp_path / "study"


@pytest.fixture
def play(tmp_path, out):
    """play(*groups, losses, failing, script, **environment): (the finished script, [words of each call of gdmpi]).

    losses: {name of a run: its last validation loss, None if it has not come to its end}; accuracies are 10 less a
    loss. failing: runs that do.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB.format(python=sys.executable, place=tmp_path))
    (tmp_path / "bin" / "python").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(*groups, losses=(), failing=(), script=STUDY, **settings):
        for name, loss in dict(losses).items():
            last = {"eval_loss": loss, "eval_accuracy": 10 - (loss or 0)}
            run = {"rounds_planned": 3, "rounds_done": 2 if loss is None else 3, "rounds": [last]}
            (tmp_path / f"{name}.json").write_text(json.dumps(run))
        (tmp_path / "failing").write_text("".join(f"{name}\n" for name in failing))
        (tmp_path / "calls").write_text("")
        env = {"PATH": path, "OUT": str(out), "LAUNCH": "", **settings}
        done = subprocess.run(["bash", script, *groups], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        return done, [line.split("\t") for line in (tmp_path / "calls").read_text().splitlines()]

    return start


def runs(calls):
    """{name: the settings it was started with} of the runs among calls, in order; each starts or goes on."""
    found = {}
    for words in calls:
        if words[0] == "run":
            assert words[1] == "--continue" and words[2].endswith(".yaml")
            settings = {"run.seed": "0"} | dict(word.split("=", 1) for word in words[3:])
            assert found.setdefault(settings["run.name"], settings) == settings
    return found


METHODS = ("delta", "full", "merged", "centralized", "local")


def falling(best, rates, methods=METHODS):
    """Losses of the tuning runs of methods: each method's best rate has the lowest."""
    return {f"{m}-lr{rate}-seed0": 9.0 + (rate != best[m]) for m in methods for rate in rates}


RATES = ("1e-3", "3e-3", "1e-2", "3e-2")


def test_each_method_goes_on_with_its_best_rate(play, out):
    best = dict(zip(METHODS, (*RATES, "1e-2"), strict=True))
    done, calls = play("main", losses=falling(best, RATES), SEEDS="0 1")
    assert done.returncode == 0, done.stderr
    expected = {f"{m}-lr{rate}-seed0" for m in METHODS for rate in RATES} | {f"{m}-lr{best[m]}-seed1" for m in METHODS}
    found = runs(calls)
    assert set(found) == expected
    assert all(settings["train.lr"] == name.split("-lr")[1].split("-seed")[0] for name, settings in found.items())
    chosen = [f"{out}/{m}-lr{best[m]}-seed{seed}" for m in METHODS for seed in (0, 1)]
    assert calls[-2:] == [
        ["show", "--format", "markdown", *chosen],
        ["plot", *chosen, "-o", f"{out}/main.png"],
    ]
    assert (out / "main.md").read_text() == "| a table |\n" and "| a table |" in done.stdout
    assert not list(out.glob("*.out"))


@pytest.mark.parametrize("rate", [RATES[0], RATES[-1]])
def test_a_rate_that_diverges_is_no_choice_and_no_reason_to_stop(play, rate):
    """Whether its run fails, before or after there is something to show, is not done, or ends with nan or inf."""
    names = [f"{m}-lr{rate}-seed0" for m in METHODS]
    losses = falling(dict.fromkeys(METHODS, "3e-3"), RATES)
    losses |= dict(zip(names, (None, None, None, float("nan"), float("inf")), strict=True))
    del losses[names[1]]
    done, calls = play("main", losses=losses, failing=names[:2], SEEDS="1")
    assert done.returncode == 0, done.stderr
    assert {f"{m}-lr3e-3-seed1" for m in METHODS} <= set(runs(calls)) and calls[-1][0] == "plot"
    assert len(runs(calls)) == 20 + 5
    assert [f"words of {name}" in done.stderr for name in names] == [True, True, False, False, False]
    assert "Traceback" not in done.stderr


def test_a_method_of_which_no_rate_is_done_is_said(play):
    losses = falling(dict.fromkeys(METHODS, "1e-3"), RATES) | {f"full-lr{rate}-seed0": None for rate in RATES}
    done, calls = play("main", losses=losses)
    assert done.returncode == 1 and done.stderr.startswith("study.sh: full: no learning rate came to its end")
    assert not any(word.endswith("-lr-seed0") for words in calls for word in words)


def test_a_run_that_fails_ends_the_study_with_its_last_words(play, out):
    done, calls = play("batch", failing=["batch8-seed1"])
    assert done.returncode == 1 and "words of batch8-seed1" in done.stderr
    assert (out / "batch8-seed1.out").read_text() == "words of batch8-seed1\n"
    assert list(runs(calls))[-1] == "batch8-seed1" and calls[-1][0] == "run"
    again, repeated = play("batch")
    assert again.returncode == 0 and runs(repeated).items() >= runs(calls).items()
    assert not list(out.glob("*.out"))


def test_runs_in_which_groups_meet_are_the_same(play, out):
    groups = ("rank", "batch", "clients", "split")
    shared = []
    for group in groups:
        done, calls = play(group, SEEDS="0 1")
        assert done.returncode == 0, done.stderr
        found = runs(calls)
        names = {name.rsplit("-seed", 1)[0] for name in found}
        assert len(found) == 2 * len(names) and f"{out}/base-seed1" in calls[-2]
        shared.append(found["base-seed1"])
    assert all(settings == shared[0] for settings in shared)
    done, calls = play(*groups, SEEDS="0 1")
    told = [words for words in calls if words[0] == "plot"]
    assert [Path(words[-1]).stem for words in told] == list(groups)
    assert not any("batch8" in word for word in told[0]) and len(set(map(len, told))) > 1


@pytest.mark.parametrize("model", ["small", "llama2-7b"])
def test_every_setting_is_one_that_a_configuration_takes(play, out, model):
    """All groups, with both models: alpha / r is that of r = 64, and no two runs are the same under two names."""
    rates = RATES if model == "small" else ("5e-5", "1e-4", "2e-4", "4e-4")
    groups = ("main", "rank", "batch", "clients", "split", "long")
    losses = falling(dict.fromkeys(METHODS, rates[0]), rates)
    done, calls = play(*groups, losses=losses, SEEDS="0", MODEL=model)
    assert done.returncode == 0, done.stderr
    configs = {}
    for words in (words for words in calls if words[0] == "run"):
        config = configuration.load(ROOT / words[2], words[3:])
        assert config.run.out == str(out)
        configs[config.run.name] = config
    assert len(configs) == 20 + 1 + 3 + 3 + 4 + 2 + 2
    plain = [config.plain() for name, config in configs.items() if "-lr" not in name]
    assert len({json.dumps(each | {"run": each["run"] | {"name": ""}}) for each in plain}) == len(plain) == 15
    adapters = [c.model.adapter for c in configs.values() if c.model.adapter.kind == "lora"]
    assert len({each.alpha / each.r for each in adapters}) == 1 and {each.r for each in adapters} == {16, 32, 64, 128}
    assert {c.run.rounds for name, c in configs.items() if name.startswith("long")} == {50}
    assert {c.clients.per_round * c.clients.count for name, c in configs.items() if name.endswith("-5-seed0")} == {5}


# ---- frameworks -----------------------------------------------------------------------------------------------------

THREE, FAMILY = ("fedllm", "kd", "split"), ("gradualdiff", "fedit", "ffa", "rolora", "flora", "fedex")
TRIED, HIGHER = ("1e-3", "3e-3", "1e-2"), ("3e-3", "1e-2", "3e-2")


def test_frameworks_go_on_with_the_rate_of_the_highest_accuracy(play, out):
    best = dict(zip(THREE, ("3e-3", "1e-2", "3e-3"), strict=True))
    done, calls = play(script=COMPARE, losses=falling(best, TRIED, THREE), SEEDS="0 1")
    assert done.returncode == 0, done.stderr
    expected = {f"{m}-lr{rate}-seed0" for m in THREE for rate in TRIED} | {f"{m}-lr{best[m]}-seed1" for m in THREE}
    assert set(runs(calls)) == expected
    files = {words[2] for words in calls if words[0] == "run"}
    assert files == {f"configs/frameworks/{name}.yaml" for name in THREE}
    chosen = [f"{out}/{m}-lr{best[m]}-seed{seed}" for m in THREE for seed in (0, 1)]
    assert calls[-1] == ["plot", *chosen, "-o", f"{out}/frameworks.png"]


def test_the_family_is_told_at_equal_tokens_and_at_equal_bytes_and_its_rates_hold_by_topic(play, out):
    best = dict(zip(FAMILY, ("3e-3", "1e-2", "3e-3", "1e-2", "3e-3", "1e-2"), strict=True))
    losses = falling(best, HIGHER, FAMILY)
    done, calls = play("family", "topics", script=COMPARE, losses=losses, SEEDS="0 1")
    assert done.returncode == 0, done.stderr
    found = runs(calls)
    assert len(found) == len(FAMILY) * (3 + 1) + len(FAMILY) * 2
    by_topic = {name: settings for name, settings in found.items() if name.startswith("topics-")}
    assert {(s["method.name"], s["train.lr"]) for s in by_topic.values()} == set(best.items())
    assert {s["clients.split"] for s in by_topic.values()} == {"{kind: by, column: topic}"}
    equal = [words for words in calls if "--at" in words]
    assert [words[words.index("--at") + 1] for words in equal] == ["bytes=9", "bytes=9"]
    assert (out / "topics-bytes.md").read_text() == "| a table |\n"


def test_texts_stand_beside_the_familys_own_runs(play):
    names = (*FAMILY, "kd-texts", "local")
    losses = falling(dict.fromkeys(names, "3e-3"), HIGHER, names)
    done, calls = play("family", "texts", script=COMPARE, losses=losses, SEEDS="0")
    assert done.returncode == 0, done.stderr
    assert len(runs(calls)) == len(FAMILY) * 3 + 2 * 3  # and those of fedit, which are the same


def test_topics_want_rates_first(play):
    done, calls = play("topics", script=COMPARE)
    assert done.returncode == 1 and "play the group family first" in done.stderr and not runs(calls)


def test_two_of_five_clients_have_another_architecture(play, out):
    (out / "gpt2-stories").mkdir(parents=True)
    losses = falling(dict.fromkeys(("kd", "kd-mixed"), "3e-3"), TRIED, ("kd", "kd-mixed"))
    done, calls = play("architectures", script=COMPARE, losses=losses, SEEDS="0")
    assert done.returncode == 0, done.stderr
    mixed = runs(calls)["kd-mixed-lr3e-3-seed0"]
    assert mixed["model.others"] == f"{{3: {out}/gpt2-stories, 4: {out}/gpt2-stories}}"


def test_every_setting_of_the_frameworks_is_one_that_a_configuration_takes(play, out):
    (out / "gpt2-stories").mkdir(parents=True)
    names = (*THREE, *FAMILY, "kd-mixed", "kd-texts", "local")
    losses = falling(dict.fromkeys(names, "3e-3"), {*TRIED, *HIGHER}, names)
    done, calls = play(
        "frameworks", "architectures", "family", "topics", "texts", script=COMPARE, losses=losses, SEEDS="0"
    )
    assert done.returncode == 0, done.stderr
    plain = [
        configuration.load(ROOT / words[2], words[3:]).plain() for words in calls if words[0] == "run"
    ]  # kd is in two groups
    assert len({json.dumps(each | {"run": each["run"] | {"name": ""}}) for each in plain}) == 9 + 3 + 18 + 6 + 6


@pytest.mark.parametrize(
    ("groups", "settings", "says"),
    [
        (
            ["ranks"],
            {"script": COMPARE},
            "compare.sh: ranks: no such group; known are frameworks, architectures, family, texts, topics\n",
        ),
        (["ranks"], {}, "study.sh: ranks: no such group; known are main, rank, batch, clients, split, long\n"),
        (["long"], {"MODEL": "large"}, "study.sh: MODEL=large: no such model; known are small, llama2-7b\n"),
    ],
)
def test_what_is_unknown_is_said_in_a_line(play, groups, settings, says):
    done, calls = play(*groups, **settings)
    assert (done.returncode, done.stderr, calls) == (2, says, [])
