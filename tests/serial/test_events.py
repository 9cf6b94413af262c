"""Event files for TensorBoard, as its own reader reads them."""

import math
import sys

import pytest
import yaml
from conftest import launch
from synthetic import row

from gdmpi import checkpoint, config as configuration, events, log, mpi, record, run
from gdmpi.errors import UserError


def read(directory):
    """{tag: [(step, value)]} of all event files of a directory, nothing purged."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for path in sorted(directory.glob("*tfevents*")):
        reader = accumulator.EventAccumulator(str(path), purge_orphaned_data=False).Reload()
        for tag in reader.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in reader.Scalars(tag))
    return found


def test_scalars_of_a_round():
    found = events.scalars(row(1, 2.0, clients=3, size=10, test=1.5, server={"drift": 0.25}))
    assert (found["loss/training"], found["loss/validation"], found["loss/test"]) == (2, 2, 1.5)
    assert (found["bytes/up"], found["seconds/evaluation"], found["server/drift"]) == (30, 0.25, 0.25)
    assert "speed/mfu" not in found  # not known is not 0
    assert set(events.scalars(row(0, 2.0))) == {"loss/validation", "perplexity/validation"}
    assert math.isnan(events.scalars(row(1, math.nan))["loss/validation"])


def test_a_new_start_writes_all_rounds_anew(tmp_path):
    pytest.importorskip("tensorboard")
    first = events.Events(tmp_path / "tb", [row(0, 4.0)])
    for t in (1, 2):
        first.add(row(t, 4.0 - t))
    assert read(tmp_path / "tb")["loss/validation"] == [(0, 4), (1, 3), (2, 2)]  # there without a close
    (tmp_path / "tb" / "events.out.tfevents.1.elsewhere").write_bytes(b"cut off")
    second = events.Events(tmp_path / "tb", [row(0, 4.0), row(1, 3.0)])
    second.add(row(2, 2.5))
    assert read(tmp_path / "tb")["loss/validation"] == [(0, 4), (1, 3), (2, 2.5)]
    assert len(list((tmp_path / "tb").iterdir())) == 1


def test_run_and_resume_have_each_round_once(tiny, tmp_path):
    from mpi4py import MPI

    pytest.importorskip("tensorboard")
    words = ["run.rounds=2", "train.steps=1", "run.name=run", f"run.out={tmp_path}", "run.tensorboard=true"]
    config = configuration.load(tiny / "tiny.yaml", words)
    run.play(mpi.Link(MPI.COMM_SELF), config, log.Log(False))
    _, state = checkpoint.newest(config.directory, pytest.fail)
    (config.directory / "round-000002.h5").unlink()  # as if the last round had not been finished
    _, state = checkpoint.newest(config.directory, pytest.fail)
    longer = configuration.load(overrides=["run.rounds=3"], base=yaml.safe_load(state.config))
    book = run.play(mpi.Link(MPI.COMM_SELF), longer, log.Log(False), state)
    found = read(config.directory / "tensorboard")
    assert found["loss/validation"] == [(r["round"], pytest.approx(r["eval_loss"])) for r in book.rows]
    assert [step for step, _ in found["seconds/total"]] == [1, 2, 3] and [s for s, _ in found["loss/test"]] == [3]
    assert not {"memory/client", "speed/tokens_per_second"} - found.keys()


def test_run_killed_before_its_first_round_can_be_started_again(tmp_path):
    (tmp_path / "log.txt").touch()
    (tmp_path / "tensorboard").mkdir()
    assert record._holds_no_round(tmp_path)


def test_missing_library_is_said_before_anything_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    on, off = (configuration.load(tiny / "tiny.yaml", [f"run.tensorboard={value}"]) for value in ("true", "false"))
    with pytest.raises(UserError, match=r"run.tensorboard: .* pip install 'gdmpi\[tensorboard\]'"):
        events.check(on)
    assert events.check(off) is None
    hidden = "import sys; sys.modules['tensorboard'] = None; from gdmpi.__main__ import main; sys.exit(main())"
    words = [tiny / "tiny.yaml", f"run.out={tmp_path / 'runs'}", "run.tensorboard=true"]
    refused = launch(["run", *words], program=("-c", hidden))
    assert refused.code == 2 and refused.err.startswith("gdmpi: run.tensorboard: ") and refused.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
