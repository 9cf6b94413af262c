"""Runs that stop early on purpose: exit 75, nothing lost, and the next start goes on to the same bits."""

import contextlib
import csv
import json
import shutil
import time
from pathlib import Path

import faults
import h5py
import numpy as np
import pytest
from conftest import ROOT, launch, tiny_model, within

from gdmpi import checkpoint, report

FAULTS = ROOT / "tests" / "faults.py"
several = pytest.mark.mpi(min_size=3)


@pytest.fixture(scope="module")
def whole(tiny):
    """The adapter's hash after a run that nothing happened to."""
    within(["run", tiny / "tiny.yaml", "run.name=whole"]).ok()
    return report.summary(tiny / "runs" / "whole")["adapter_sha256"]


def start(tiny, name, *settings, ranks=1, fault=None, begin=within):
    """One start of a batch job's run; (Result, run directory)."""
    words = ["run", "--continue", tiny / "tiny.yaml", f"run.name={name}", *settings]
    if begin is launch:
        return launch(words, ranks, program=(FAULTS, fault)), tiny / "runs" / name
    with faults.within(fault) if fault else contextlib.nullcontext():
        return within(words, ranks), tiny / "runs" / name


def paused(result, run, rounds, *says):
    assert result.code == 75, f"exit {result.code}\n{result.out}\n{result.err}"
    last = result.out.splitlines()[-1]
    assert last.startswith("stopped before its end") and f"resume {run}" in last
    assert all(text in last for text in says), last
    assert checkpoint.round_of(checkpoint.files(run)[0]) == rounds
    assert not list(run.rglob("*.part"))


def complete(run, whole):
    found = report.summary(run)
    assert found["adapter_sha256"] == whole
    with (run / "metrics.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == [str(t) for t in range(found["rounds_done"] + 1)]


@pytest.mark.parametrize("ranks", [3, 1])
def test_signal_in_training_stops_at_once_and_the_next_start_goes_on(tiny, whole, ranks):
    begin = launch if ranks > 1 else within
    result, run = start(tiny, f"signal-{ranks}", "run.grace=0", ranks=ranks, fault="told_to_leave", begin=begin)
    paused(result, run, 1, "SIGUSR1")
    result, run = start(tiny, f"signal-{ranks}")
    result.ok()
    assert "resumed after round 1 of 3" in result.out
    complete(run, whole)
    result, run = start(tiny, f"signal-{ranks}")
    assert "nothing to do: 3 of 3 rounds are done" in result.ok().out


@several
def test_round_that_is_over_soon_is_finished_first(tiny, whole):
    result, run = start(tiny, "grace", "run.grace=1000", ranks=3, fault="told_to_leave")
    paused(result, run, 2, "signal")
    within(["resume", run]).ok()
    complete(run, whole)


def test_server_hears_it_while_the_others_train(tiny, whole):
    result, run = start(tiny, "server", "run.grace=0", ranks=3, fault="server_told_to_leave", begin=launch)
    paused(result, run, 1, "SIGTERM at rank 0")
    within(["resume", run]).ok()
    complete(run, whole)


@several
def test_job_that_is_too_short_for_all_rounds_needs_several_starts(tiny, whole, monkeypatch):
    for rounds in (1, 2):
        result, run = start(tiny, "short", "run.time_limit=1e-3", "run.grace=0", ranks=4 - rounds)
        paused(result, run, rounds, "run.time_limit comes in 0 s")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    result, run = start(tiny, "short", "run.grace=0")
    result.ok()  # a start always plays one round, and here it is the last
    complete(run, whole)


@several
def test_two_starts_without_a_new_round_are_enough(tiny):
    result, run = start(tiny, "stuck", fault="told_at_the_start")
    assert result.code == 75
    assert "nothing is saved yet: start it again as before" in result.out
    assert (run / "starts.json").exists()
    result, _ = start(tiny, "stuck", fault="told_at_the_start", ranks=2)
    assert result.code == 1
    assert "2 starts in a row saved no round at all" in result.err
    result, _ = start(tiny, "stuck")  # as Slurm itself starts it again where the second was killed
    assert result.code == 1
    assert "2 starts in a row" in result.err and "Traceback" not in result.err
    start(tiny, "stuck")[0].ok()


@several
def test_told_to_leave_before_anything_is_there_a_run_leaves_nothing(tiny):
    with faults.within("told_at_the_start"):
        assert within(["run", tiny / "tiny.yaml", "run.name=early"], 2).code == 75
    assert not (tiny / "runs" / "early").exists()


@several
def test_going_on_takes_the_choices_of_the_run_and_refuses_another_model(tiny):
    start(tiny, "choices", "run.rounds=1")[0].ok()
    result, run = start(tiny, "choices", "run.rounds=2", "train.lr=0.02")
    changed = [line for line in result.ok().out.splitlines() if line.startswith("changed since")]
    assert [line.split()[4] for line in changed] == ["run.rounds", "train.lr"]  # and no auto
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result, _ = start(tiny, "choices", "run.rounds=3", "model.adapter.r=8", ranks=2)
    assert (result.code, result.out) == (2, "")
    assert "model.adapter.r: cannot change" in result.err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- round files that do not fit ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tiny, tmp_path_factory):
    """A folder with a model of its own and a run that keeps something for its clients."""
    place = tmp_path_factory.mktemp("played")
    shutil.copytree(tiny / "model", place / "model")
    settings = [f"run.out={place}", "run.name=r", "run.rounds=1", "train.keep_optimizer=true"]
    # by a relative name, so that a copy of the folder has a model of its own too
    launch(["run", tiny / "tiny.yaml", "model.name=./model", *settings], cwd=place).ok()
    return place


@pytest.fixture
def moving(played, tmp_path, monkeypatch):
    """A copy of that run, whose model and files may be replaced."""
    copy = Path(shutil.copytree(played, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy / "r"


def refuses(run, *says, words=("run.rounds=2",)):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = within(["resume", run, *words])
    assert (result.code, result.out) == (2, ""), result.out + result.err
    (line,) = result.err.splitlines()
    assert all(text in line for text in says), line
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_round_file_of_another_model(moving):
    from safetensors.numpy import load_file, save_file

    weights = moving.parent / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    refuses(moving, "model.name", "not the model that the run began with")


def test_round_file_of_another_adapter_shape(moving):
    model = moving.parent / "model"
    shutil.rmtree(model)
    tiny_model(model, layers=3)
    with h5py.File(moving / checkpoint.name(1), "r+") as file:
        about = checkpoint.read(moving / checkpoint.name(0)).about
        del about["base_sha256"]  # as if it had been written before base models were told apart
        del file["about"]
        checkpoint._put(file, "about", json.dumps(about))
    refuses(moving, "model.adapter", "does not fit")


def test_clients_file_that_is_not_the_one_that_was_committed(moving):
    path = checkpoint.client_path(moving / "clients", 1, 1)
    with h5py.File(path, "r+") as file:
        key = next(key for key in file if isinstance(file[key], h5py.Dataset))
        file[key][...] = np.asarray(file[key]) + 1
    refuses(moving, str(path), "hash differs")
    path.unlink()
    refuses(moving, str(path), "missing")


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [("version", 99, "format version 99"), ("format", np.bytes_(b"weather"), "not a file of the format")],
)
def test_round_file_of_a_newer_version_or_another_program(moving, attribute, value, says):
    with h5py.File(moving / checkpoint.name(1), "r+") as file:
        file.attrs[attribute] = value
    refuses(moving, says)
