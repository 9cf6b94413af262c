"""Killed at the worst places and resumed, a run is one that nothing happened to; the long form is tests/kills.py."""

import pytest
from conftest import ROOT, launch
from kills import IN_ROUNDS, Harness, Kill
from places import PLACES

# (ranks, kill) a launch; what comes after the last one is not killed
CASES = {
    "the start and the first round": [
        (2, Kill("built", 0, "all")),
        (1, Kill("round_renamed", 0)),
    ],
    "a round": [
        (3, Kill("between", 0, nth=3)),
        (2, Kill("round_inside", 0, "all", nth=60)),
        (3, Kill(IN_ROUNDS, 2, moment=0.4)),
    ],
    "the end": [
        (3, Kill("round_written", 0, nth=6)),
        (1, Kill("export_between", 0)),
    ],
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_one_that_was_not(harness, case):
    kills = CASES[case]

    def plan(attempt, run):
        ranks, kill = kills[attempt] if attempt < len(kills) else (1, None)
        return None, ranks, kill

    before = harness.kills.copy()
    harness.play(list(CASES).index(case), plan)  # raises kills.Failure at any difference
    at = {kill.place for _, kill in kills} & PLACES.keys()
    assert {place for place in at if harness.kills[place] > before[place]} == at  # each was really passed


def test_all_places_to_kill_at_are_there():
    """A name that is gone from gdmpi is an AttributeError here."""
    script = "import places\nfor place in places.PLACES.values():\n    place.install(lambda: None)"
    launch([], program=("-c", script), env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}).ok()
