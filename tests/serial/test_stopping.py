"""When a run stops early: the estimate, and what a signal does to a round."""

import math
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from gdmpi import build, stopping


@pytest.fixture
def clock(monkeypatch):
    """make(**settings) gives a Clock whose hands are moved by advance(seconds)."""
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping.time, "time", lambda: now[0])
    monkeypatch.setattr(stopping, "heard", None)
    monkeypatch.delenv(stopping.JOB_END, raising=False)

    def advance(seconds):
        now[0] += seconds

    return stopping.Clock, advance


def play(clock, advance, *rounds):
    for seconds in rounds:
        clock.round_begins()
        advance(seconds)


def test_without_a_limit_time_never_runs_out(clock):
    make, advance = clock
    hands = make(grace=30)
    play(hands, advance, 1e6)
    assert hands.out_of_time() is None


def test_another_round_must_fit_with_what_saving_and_ending_take(clock):
    make, advance = clock
    hands = make(grace=30, limit=400)
    play(hands, advance, 100)
    assert hands.out_of_time() is None  # 300 s left, 110 + 30 needed
    play(hands, advance, 100)
    assert hands.out_of_time() is None  # 200 s left
    play(hands, advance, 80)
    assert hands.out_of_time() == "run.time_limit comes in 120 s, a round takes 110 s"


def test_a_slow_round_counts_until_it_is_long_over(clock):
    make, advance = clock
    hands = make(grace=0, limit=1000)
    play(hands, advance, 400, 100, 100)
    assert hands.out_of_time() == "run.time_limit comes in 400 s, a round takes 440 s"
    play(hands, advance, 100, 100)
    assert hands.out_of_time() is None  # 200 s left; the last three took 100 s


def test_slurms_limit_is_known_and_the_sooner_end_counts(clock, monkeypatch):
    make, advance = clock
    monkeypatch.setenv(stopping.JOB_END, "1100")
    for limit, why in (
        (None, "the Slurm job's time limit"),
        (1000, "the Slurm job's time limit"),
        (50, "run.time_limit"),
    ):
        hands = make(grace=0, limit=limit)
        assert hands.why == why
    hands = make(grace=0)
    play(hands, advance, 99)
    assert "comes in 1 s" in hands.out_of_time()


def test_signal_ends_a_round_at_once_unless_it_is_nearly_over(clock, monkeypatch):
    make, advance = clock
    hands = make(grace=30)
    play(hands, advance, 100)
    hands.round_begins()
    assert hands.leaving() is None
    monkeypatch.setattr(stopping, "heard", "SIGTERM")
    assert hands.leaving() == "SIGTERM"
    advance(75)  # 25 s to go
    assert hands.leaving() is None and hands.finishing
    advance(100)  # it takes longer than was thought; leaving now would waste it
    assert hands.leaving() is None
    hands.round_begins()  # the wish came too late to be heard: then in the next round
    assert hands.leaving() == "SIGTERM"


def test_in_the_first_round_nobody_knows_how_long_it_takes(clock, monkeypatch):
    make, _ = clock
    hands = make(grace=math.inf)
    hands.round_begins()
    monkeypatch.setattr(stopping, "heard", "SIGUSR1")
    assert hands.leaving() is None  # whoever leaves a round any time gets it
    hands = make(grace=1e9)
    hands.round_begins()
    assert hands.leaving() == "SIGUSR1"


def test_a_signal_is_noted_and_kills_nobody():
    code = (
        "import os, signal; from gdmpi import stopping\n"
        "stopping.listen('SIGUSR1'); os.kill(os.getpid(), signal.SIGUSR1); print(stopping.heard, flush=True)\n"
        "stopping.ignore('SIGUSR1'); os.kill(os.getpid(), signal.SIGUSR1)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "SIGUSR1"
    assert result.returncode == -signal.SIGUSR1


def test_gpus_shared_or_left_alone_are_said():
    everyone = [("a", False), ("a", True), ("a", True), ("b", True), ("b", True)]
    devices = ["cuda:0", "cuda:0", "cuda:0", "cuda:1"]
    known = [{"device": device, "unused": 0} for device in devices]
    assert build._crowded(everyone, known) == ["2 client ranks share cuda:0 on a"]
    assert build._unused(everyone, known) == []
    known = [{"device": "cpu", "unused": n} for n in (0, 0, 4, 4)]
    assert build._crowded(everyone, known) == []
    assert build._unused(everyone, known) == ["run.device is cpu: the GPUs of b are not used"]


def test_clock_of_the_process_itself():
    hands = stopping.Clock(grace=0, limit=3600)
    hands.round_begins()
    assert hands.end == pytest.approx(time.time() + 3600, abs=60)
    assert hands.out_of_time() is None
