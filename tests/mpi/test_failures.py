"""One rank's problem is everyone's orderly end: each fault is really injected, none hangs, each says what it was."""

import os
import time

import faults
import pytest
from conftest import ROOT, first, launch, launcher, tiny_rows, within, write_rows

from gdmpi import report, run as rounds, train

FAULTS = ROOT / "tests" / "faults.py"
several = pytest.mark.mpi(min_size=3)


def fail(tiny, fault, *settings, ranks=3, **options):
    """Run tiny.yaml with a fault under mpirun; (Result, run directory)."""
    name = f"fault-{fault}-{ranks}"
    arguments = [fault, "run", tiny / "tiny.yaml", f"run.name={name}", *settings]
    return launch(arguments, ranks, program=(FAULTS,), **options), tiny / "runs" / name


def fail_within(tiny, fault, *settings, ranks=3):
    """As fail(), in the processes of the tests."""
    name = f"fault-{fault}-{ranks}"
    with faults.within(fault):
        result = within(["run", tiny / "tiny.yaml", f"run.name={name}", *settings], ranks)
    return result, tiny / "runs" / name


IN_A_ROUND = pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("client_raises", "round 2: client 1 on rank"),
        ("server_raises", "round 2: server on rank 0"),
        ("nan_in_delta", "round 2: client 2 on rank"),
    ],
)


@IN_A_ROUND
def test_exception_in_a_round_ends_all_ranks(tiny, fault, says):
    ended_in_a_round(*fail(tiny, fault), says)


@IN_A_ROUND
def test_exception_in_a_round_ends_a_process_alone(tiny, fault, says):
    ended_in_a_round(*fail_within(tiny, fault, ranks=1), says)


def ended_in_a_round(result, run, says):
    assert result.code == 1, result.out + result.err
    lines = [line for line in result.err.splitlines() if line.startswith("gdmpi: ")]
    assert len(lines) == 1, result.err
    assert says in lines[0]
    assert "Traceback" not in result.err
    (trace,) = (run / "errors").iterdir()
    assert "Traceback" in trace.read_text()
    assert report.verify(run)[1]  # what was saved is whole


@several
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("broadcast_raises", "round 3: server on rank 0 @ "),
        ("evaluation_raises", "rank 1 @ "),
        ("disk_full", "round 2: cannot save it: [Errno 28] No space left on device"),
    ],
)
def test_other_failures_end_all_ranks(tiny, fault, says):
    result, run = fail_within(tiny, fault)
    assert result.code == 1, result.out + result.err
    assert says in result.err
    assert report.verify(run)[1]
    assert report.summary(run)["rounds_done"] == (0 if fault == "evaluation_raises" else 1)


@several
@pytest.mark.parametrize(
    ("fault", "kind"), [("client_out_of_memory", "RuntimeError"), ("client_raises", "MemoryError")]
)
def test_memory_that_is_not_enough_is_said_with_what_to_turn_down(tiny, fault, kind):
    result, _ = fail_within(tiny, fault, f"run.name=memory-{fault}")
    assert result.code == 1, result.out + result.err
    (line,) = (line for line in result.err.splitlines() if line.startswith("gdmpi: "))
    assert "round 2: client 1 on rank 2 @ " in line and kind in line
    for key in ("train.pass_tokens", "data.max_length", "train.checkpointing=true", "model.quantize=nf4"):
        assert key in line


@several
def test_client_that_cannot_save_what_it_keeps(tiny):
    result, run = fail_within(tiny, "client_disk_full", "train.keep_optimizer=true")
    assert result.code == 1, result.out + result.err
    assert "round 2: client 1 on rank 2 @" in result.err and "No space left on device" in result.err
    assert report.verify(run)[1]
    assert report.summary(run)["rounds_done"] == 1
    within(["resume", run], 2).ok()
    assert report.verify(run)[1]
    assert not list(run.rglob("*.part"))


@several
def test_run_directory_that_vanishes(tiny):
    result, _ = fail_within(tiny, "directory_vanishes")
    assert result.code == 1, result.out + result.err
    assert "round 2: cannot save it" in result.err and "there are no round files any more" in result.err


def test_an_early_failure_does_not_wait_for_long_training(tiny):
    start = time.monotonic()
    result, _ = fail(tiny, "client_raises_early", timeout=50)
    assert result.code == 1
    assert "client 1 on rank 2" in result.err
    assert time.monotonic() - start < 45  # the others would have trained for a minute


def test_exception_that_nobody_votes_on_aborts(tiny):
    result, run = fail(tiny, "outside_any_vote")
    assert result.code != 0
    assert "gdmpi: rank 1 @ " in result.err
    assert "ZeroDivisionError: nobody votes on this" in result.err
    assert "ZeroDivisionError" in (run / "errors" / "rank-0001.txt").read_text()


def test_watchdog_says_where_every_rank_stands_and_ends_the_job(tiny):
    result, run = fail(tiny, "hang", ranks=3)
    assert result.code != 0
    traces = {path.name: path.read_text() for path in (run / "errors").glob("hang-*.txt")}
    assert len(traces) == 3
    asleep = [text for text in traces.values() if "in action" in text]
    assert len(asleep) == 1 and "not done after 5 s" in asleep[0]
    assert report.verify(run)[1]


@pytest.fixture(scope="module")
def whole(tiny):
    """The directory of a run that nothing happened to."""
    within(["run", tiny / "tiny.yaml", "run.name=unkilled"]).ok()
    return tiny / "runs" / "unkilled"


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_a_killed_rank_ends_the_job_and_resume_goes_on(tiny, whole, mpi):
    result, run = fail(tiny, "killed", ranks=3, mpi=mpi)
    assert result.code != 0
    launch(["resume", run], 3, mpi=mpi).ok()
    assert report.summary(run)["adapter_sha256"] == report.summary(whole)["adapter_sha256"]


# ---- wrong input: one line, exit 2, nothing started -----------------------------------------------------------------


def refused(result, *says):
    assert result.code == 2, f"exit {result.code}\n{result.out}\n{result.err}"
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("gdmpi: ")
    for text in says:
        assert text in lines[0]
    assert result.out == ""


@several
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.lrr=1"], ["train.lrr", "unknown key", "did you mean lr?"]),
        (["train.lr=fast"], ["train.lr", "not 'fast'"]),
        (["clients.count=200"], ["clients.count", "200", "48"]),
        (["method.name=gradualdif"], ["did you mean gradualdiff?"]),
        (["model.name=/no/such/model"], ["model.name", "/no/such/model"]),
        (["model.adapter.targets=[w_pack]"], ["model.adapter.targets", "q_proj"]),
        (["data.name=/no/such/file.jsonl"], ["/no/such/file.jsonl"]),
        (["data.template=Answer:"], ["data.template"]),
        (["clients.boundary=site"], ["clients.boundary"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_wrong_input_is_one_line_and_starts_nothing(tiny, settings, says):
    words = settings if settings == ["nonsense"] else [tiny / "tiny.yaml", "run.name=refused", *settings]
    refused(within(["run", *words], 3), *says)
    assert not (tiny / "runs" / "refused").exists()


@several
@pytest.mark.parametrize(
    ("content", "says"),
    [("", "empty.jsonl"), ("{not json\n", "broken.jsonl"), ('{"a": 1}\n', "columns.jsonl")],
    ids=["empty", "broken", "columns"],
)
def test_data_files_that_cannot_be_used(tiny, tmp_path, content, says):
    path = tmp_path / says
    if first():
        path.write_text(content)
    refused(within(["run", tiny / "tiny.yaml", "run.name=refused", f"data.name={path}"], 2), says)


@several
def test_existing_run_directory_is_not_touched(tiny):
    directory = tiny / "runs" / "taken"
    if first():
        directory.mkdir(parents=True)
        (directory / "notes.txt").write_text("mine")
    refused(within(["run", tiny / "tiny.yaml", "run.name=taken"], 2), "taken", "exists", "resume")
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


def test_directory_of_a_live_run_is_left_alone(tiny):
    import fcntl

    run = tiny / "runs" / "live"
    within(["run", tiny / "tiny.yaml", "run.name=live", "run.rounds=1"]).ok()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with (run / "log.txt").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # as the rank 0 of another run holds it
        result = launch(["resume", run, "run.rounds=2"], 2)
    assert result.code == 2
    assert "another run is writing there" in result.err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_start_that_saved_nothing_is_no_run_yet_unless_it_is_alive(tiny):
    import fcntl

    run = tiny / "runs" / "begun"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("round,train_loss\n")
    (run / "round-000000.h5.part").write_text("cut off")
    with (run / "log.txt").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        refused(launch(["run", tiny / "tiny.yaml", "run.name=begun"], 2), "another run is writing there")
    refused(within(["resume", run]), "no round files here", "started anew with run")
    (run / "metrics.csv").write_text("round,train_loss\n0,1.5\n")  # rounds were saved here; who removed them knows why
    refused(within(["run", tiny / "tiny.yaml", "run.name=begun"]), "exists")
    (run / "metrics.csv").write_text("round,train_loss\n")
    within(["run", tiny / "tiny.yaml", "run.name=begun", "run.rounds=1"]).ok()
    assert report.verify(run)[1]


@several
def test_output_that_cannot_be_written(tiny):
    refused(within(["run", tiny / "tiny.yaml", "run.out=/proc/gdmpi"], 2), "run.out", "cannot write")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; /proc stands in above")
def test_read_only_output_directory(tiny, tmp_path):
    tmp_path.chmod(0o500)
    refused(launch(["run", tiny / "tiny.yaml", f"run.out={tmp_path}"], 2), "run.out", "cannot write")


def test_launcher_and_mpi_that_do_not_know_each_other(tiny):
    # started without a launcher, so MPI sees one process whatever Slurm's variables say
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "0"}
    refused(launch(["run", tiny / "tiny.yaml"], env=step), "launched as 6 tasks, MPI sees 1", "srun --mpi=")


def test_mpirun_of_another_mpi(tiny):
    # MPICH's mpirun, and a Python whose MPI is Open MPI: each rank believes to be alone
    _, other = launcher(3, "openmpi")
    env = {name: other[name] for name in ("MPI4PY_MPIABI", "LD_LIBRARY_PATH")}
    result = launch(["run", tiny / "tiny.yaml"], 3, env=env)
    (said,) = (line for line in result.err.splitlines() if line.startswith("gdmpi: "))
    assert "launched as 3 tasks, MPI sees 1" in said
    assert result.code == 2


@pytest.fixture(scope="module")
def two_rounds(tiny):
    """The directory of a run that is done."""
    within(["run", tiny / "tiny.yaml", "run.name=refusing", "run.rounds=2"]).ok()
    return tiny / "runs" / "refusing"


@several
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["run.rounds=1"], "fewer than the 2 rounds"),
        (["model.adapter.r=8"], "model.adapter.r: cannot change"),
        (["clients.count=4"], "clients.count: cannot change"),
        (["run.seed=1"], "run.seed: cannot change"),
        (["method.weighting=examples"], "method.weighting: cannot change"),
        (["train.lrr=1"], "did you mean lr?"),
    ],
)
def test_resume_refuses_what_makes_no_sense(two_rounds, settings, says):
    run = two_rounds
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(within(["resume", run, *settings], 2), says)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@several
def test_resume_of_what_is_no_run(tmp_path):
    refused(within(["resume", tmp_path], 2), "no round files here")
    refused(within(["resume", tmp_path / "nowhere"], 2), "nowhere")
    if first():
        (tmp_path / "round-000001.h5").write_text("no HDF5")
    refused(within(["resume", tmp_path / "round-000001.h5"], 2), "damaged or no HDF5 file")


# ---- runs that fail without failing ---------------------------------------------------------------------------------


def warned(run):
    return [text for row in report.summary(run)["rounds"] for text in row["warnings"]]


def test_unchanged_adapter_is_said(tiny, monkeypatch):
    monkeypatch.setattr(train, "rate", lambda *args: 0.0)  # nothing is ever learnt
    result = within(["run", tiny / "tiny.yaml", "run.name=still", "run.rounds=1"])
    run = tiny / "runs" / "still"
    assert "warning: round 1: the adapter did not change" in result.ok().out
    assert any("did not change" in text for text in warned(run))
    assert "did not change" in (run / "metrics.csv").read_text()
    assert "did not change" in (run / "log.txt").read_text()


def test_divergence_is_said(tmp_path):
    # the demo's model, which has something to lose
    settings = ["train.lr=0.1", "train.clip_norm=null", "train.steps=4", "run.rounds=1", "clients.count=1"]
    result = within(["run", *settings, f"run.out={tmp_path}", f"run.cache={tmp_path}/cache"]).ok()
    assert "validation loss" in result.out
    assert "is diverging" in result.out
    assert any("validation loss" in text and "diverging" in text for text in warned(tmp_path / "demo"))


def test_overfitting_is_said(tiny, monkeypatch):
    real = rounds.assess

    def assess(link, parts, server, clients, message, t, *rest, **kwargs):
        row = real(link, parts, server, clients, message, t, *rest, **kwargs)
        row["eval_loss"] = 2.0 + 0.1 * t  # it rises from round to round, whatever is learnt
        return row

    monkeypatch.setattr(rounds, "assess", assess)
    result = within(["run", tiny / "tiny.yaml", "run.name=overfits", "run.rounds=4"])
    run = tiny / "runs" / "overfits"
    assert "overfitting" in result.ok().out
    assert any("overfitting" in text for text in warned(run))


def test_lora_that_is_not_where_it_was_asked_for_is_said(tiny):
    settings = ["run.name=misplaced", "run.rounds=1", "model.adapter.targets=[q_proj, w_pack]"]
    result = within(["run", tiny / "tiny.yaml", *settings]).ok()
    assert "warning: LoRA is not on w_pack" in result.out
    assert any("w_pack" in text for text in warned(tiny / "runs" / "misplaced"))


def test_rows_without_a_target_are_counted_and_said(tiny, tmp_path):
    rows = tiny_rows(30)
    for row in rows[:4]:
        row["prompt"] *= 20
    path = write_rows(tmp_path / "long.jsonl", rows)
    result = within(["run", tiny / "tiny.yaml", "run.name=dropped", "run.rounds=1", f"data.name={path}"]).ok()
    assert "4 rows dropped" in result.out
