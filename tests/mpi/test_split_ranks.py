"""Split-FedLLM between real ranks: what crosses the cut travels in every step, and the bits stay the same."""

import pytest
from conftest import launch
from test_failures import fail
from test_runs import play, shown

from gdmpi import report

SHARED = ["method.name=split", "method.server=shared", "model.adapter.dropout=0.1"]


def test_halves_that_a_server_keeps_for_each_client_survive_a_killed_rank(tiny):
    words = ["method.name=split", "method.labels=client", "train.keep_optimizer=true", "run.rounds=2"]
    result, run = fail(tiny, "killed", *words, ranks=4)
    assert result.code != 0 and report.summary(run)["rounds_done"] < 2  # 0 if the kill came before the file was there
    launch(["resume", run], 3).ok()
    assert shown(run) == shown(play(tiny, "split-unkilled", *words))


def test_one_half_for_all_clients_is_the_same_for_any_number_of_ranks(tiny):
    """Four clients on three ranks: one rank hosts the first and the last, and asks for both in their turns."""
    words = [*SHARED, "clients.count=4", "run.rounds=2"]
    four = play(tiny, "split-four", *words, ranks=4, start=launch)
    assert shown(four) == shown(play(tiny, "split-alone", *words))
    rows = report.summary(four)["rounds"]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert all(0 < row["server_idle"] < 1 for row in rows[1:])


@pytest.mark.parametrize(
    ("fault", "says"),
    [("client_raises", "round 2: client 1 on rank 2"), ("answer_raises", "round 2: server on rank 0")],
)
def test_who_waits_for_an_answer_does_not_wait_for_ever(tiny, fault, says):
    """Client 2 waits for its turn at the server, which does not come."""
    result, run = fail(tiny, fault, *SHARED, ranks=4)
    assert result.code == 1, result.out + result.err
    lines = [line for line in result.err.splitlines() if line.startswith("gdmpi: ")]
    assert len(lines) == 1 and says in lines[0], result.err
    assert report.verify(run)[1] and report.summary(run)["rounds_done"] == 1
