"""How quick training is said to be: tokens a second, the share of a device's peak, where the time went."""

import csv
import gzip
import json
import re
from types import SimpleNamespace

import pytest
import yaml

from gdmpi import checkpoint, compare, config as configuration, log, mpi, profiling, record, report, run, speed


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-32GB", 112e12),
        ("NVIDIA A10G", None),  # has about half of an A10's
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of it
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some GPU of tomorrow", None),
    ],
)
def test_peaks_go_by_the_whole_name(name, peak):
    assert speed.peak_of(name) == peak


def test_a_cpu_has_no_known_peak():
    import torch

    assert speed.peak(torch.device("cpu")) is None and speed.peak(None) is None


def note(seconds, peak, *clients):
    """What a rank notes of a round, given (target tokens, tokens) of each client that it trained."""
    metrics = [{"metrics": {"tokens": tokens, "seen": seen}} for tokens, seen in clients]
    return {"train": seconds, "peak": peak, "sent": dict(enumerate(metrics))}


def test_figures_of_a_round_by_hand():
    """Rank 1 trains two clients in 4 s, rank 2 one in 2 s; a token is 4 x 1000 + 6 x 100 operations."""
    notes = [note(0.0, None), note(4.0, 1e5, (10, 20), (30, 40)), note(2.0, 2e5, (8, 20))]
    found = speed.of_round(notes, 4.0, 1000, 100)
    assert (found["seen_tokens"], found["tokens_per_second"], found["seen_tokens_per_second"]) == (80, 12, 20)
    assert found["mfu"] == pytest.approx(80 * 4600 / (4 * 1e5 + 2 * 2e5))
    notes[2]["peak"] = None  # rank 2 has trained, so without its peak there is no figure
    assert speed.of_round(notes, 4.0, 1000, 100)["mfu"] is None


def test_nobody_trained():
    found = speed.of_round([note(0.0, 1e5), note(0.0, 1e5)], 0.0, 1000, 100)
    assert found == {"seen_tokens": 0, "tokens_per_second": None, "seen_tokens_per_second": None, "mfu": None}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The directory of a finished run of two rounds."""
    from mpi4py import MPI

    words = ["run.rounds=2", "train.steps=2", "run.name=run", f"run.out={tmp_path_factory.mktemp('speed')}"]
    config = configuration.load(tiny / "tiny.yaml", words)
    run.play(mpi.Link(MPI.COMM_SELF), config, log.Log(False))
    return config.directory


def test_rows_and_metrics_agree_with_what_was_trained(finished):
    rows = report.summary(finished)["rounds"]
    state = checkpoint.newest(finished, pytest.fail)[1]
    for row, saved in zip(rows[1:], state.metrics[1:], strict=True):
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]["train"])
        assert row["seen_tokens"] == sum(each["metrics"]["seen"] for each in saved["sent"].values()) > row["tokens"]
        assert row["seen_tokens_per_second"] == pytest.approx(row["seen_tokens"] / row["seconds"]["train"])
        assert row["mfu"] is None and row["peak_memory"] == {"0": row["peak_memory_client"]}
    with (finished / "metrics.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [float(line["tokens_per_second"] or 0) for line in cells] == [
        round(row["tokens_per_second"] or 0, 1) for row in rows
    ]
    assert cells[1]["peak_memory"] == f"0: {rows[1]['peak_memory_client']}" and cells[1]["mfu"] == ""
    assert cells[2]["seen_tokens"] == str(rows[2]["seen_tokens"])


def test_show_says_how_quick_and_where_the_time_went(finished):
    text = report.show(finished)
    assert "tokens/s" in text and "of peak" not in text
    (line,) = re.findall(r"^time: [\d.]+ s, of which (.*);.*saving \d+%$", text, re.M)
    shares = dict(part.split() for part in line.split(", "))
    assert list(shares) == ["train", "exchange", "server", "evaluation", "other"]
    assert 97 <= sum(int(share.rstrip("%")) for share in shares.values()) <= 103
    assert "memory: at most" in text
    assert "tokens/s" in compare.show([finished, finished])[0]


def test_show_has_the_share_of_the_peak_where_it_is_known(finished, monkeypatch):
    newest = checkpoint.newest(finished, pytest.fail)
    newest[1].metrics[2]["mfu"] = 0.4321
    monkeypatch.setattr(report, "load", lambda source: newest)
    head, *lines = report.show(finished).splitlines()[3:7]
    assert "of peak" in head and [" 43.2%" in line for line in lines] == [False, False, True]


def test_run_of_an_older_version_is_shown_and_gone_on_with(finished, tmp_path):
    """Its rows lack these figures: they are None in show --json and empty in metrics.csv."""
    from mpi4py import MPI

    path, state = checkpoint.newest(finished, pytest.fail)
    for row in state.metrics:
        for key in record.LATER:
            del row[key]
    old = tmp_path / "run"
    old.mkdir()
    checkpoint.write(old, state)
    assert all(row["mfu"] is row["peak_memory"] is None for row in report.summary(old)["rounds"])
    assert "time: " in report.show(old)
    words = ["run.rounds=3", f"run.out={tmp_path}"]
    config = configuration.load(overrides=words, base=yaml.safe_load(state.config))
    rows = run.play(mpi.Link(MPI.COMM_SELF), config, log.Log(False), state).rows
    assert [row["tokens_per_second"] is None for row in rows] == [True, True, True, False]
    with (old / "metrics.csv").open(newline="") as file:
        assert [line["seen_tokens"] for line in csv.DictReader(file)] == ["", "", "", str(rows[3]["seen_tokens"])]


# ---- run.profile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("done", "rounds", "traced"), [(0, 5, 2), (0, 1, 1), (3, 5, 5), (4, 5, 5), (2, 9, 4)])
def test_a_start_traces_its_second_round_or_its_only_one(done, rounds, traced):
    assert profiling.round_of(done, rounds) == traced


class Steps:
    """What profiling needs of a Trainer: a device, and someone to tell of steps."""

    def __init__(self):
        import torch

        self.told, self.model = [], SimpleNamespace(device=torch.device("cpu"))
        self.on_step = lambda *note: self.told.append(note)


def test_trace_ends_after_some_steps_and_passes_them_on(tmp_path, monkeypatch, capfd):
    import torch

    monkeypatch.setattr(profiling, "STEPS", 3)
    trainer, path = Steps(), tmp_path / "profile" / "x.json.gz"
    tell = trainer.on_step
    with profiling.traced(trainer, path):
        for done in range(5):
            torch.ones(3).cumsum(0)
            trainer.on_step(0, done)
    assert trainer.told == [(0, done) for done in range(5)] and trainer.on_step is tell
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::cumsum" for event in events) == 3
    assert [each.name for each in path.parent.iterdir()] == ["x.json.gz"]
    assert capfd.readouterr() == ("", "")


def test_no_trace_without_steps_or_after_a_failure(tmp_path):
    trainer, path = Steps(), tmp_path / "profile" / "x.json.gz"
    with profiling.traced(trainer, path):
        pass
    with pytest.raises(ArithmeticError), profiling.traced(trainer, path):
        trainer.on_step(0, 1)
        raise ArithmeticError
    assert not path.parent.exists()
    with profiling.traced(trainer, path):  # the next one is as good as ever
        trainer.on_step(0, 1)
    assert path.exists()
