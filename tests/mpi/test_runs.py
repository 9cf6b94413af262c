"""Whole runs: the same bits for any number of ranks and either MPI, resumed or not; what a run leaves behind."""

import csv
import gzip
import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, TIMES, first, launch, tiny_rows, within, write_rows

from gdmpi import checkpoint, report

METHODS = Path(__file__).resolve().parent.parent / "methods"


several = pytest.mark.mpi(min_size=3)


def play(tiny, name, *settings, ranks=1, start=within, **options):
    """Run tiny.yaml under a name; returns its directory."""
    start(["run", tiny / "tiny.yaml", f"run.name={name}", *settings], ranks, **options).ok()
    return tiny / "runs" / name


def shown(directory):
    """show --json of a run without what time and ranks change."""
    run = report.summary(directory)
    run["rounds"] = [{k: v for k, v in row.items() if k not in TIMES} for row in run["rounds"]]
    return {key: value for key, value in run.items() if key not in {"name", "ranks"}}


@pytest.fixture(scope="module")
def alone(tiny):
    return play(tiny, "alone")


@pytest.fixture(scope="module")
def kept(tiny):
    """The directory of a run that keeps all its round files."""
    return play(tiny, "kept", "run.keep=5")


@pytest.fixture(scope="module")
def private(tiny):
    """The directory of a run whose clients keep something for themselves."""
    return play(tiny, "private", "train.keep_optimizer=true", ranks=3)


@pytest.fixture(scope="module")
def quiet(tiny):
    """The Result and the directory of a run of three ranks by the command line."""
    return launch(["run", tiny / "tiny.yaml", "run.name=quiet"], 3).ok(), tiny / "runs" / "quiet"


@pytest.mark.parametrize("ranks", [None, 2, 5])  # of 5 one hosts no client; and 3: test_output_without_a_terminal_...
def test_any_number_of_ranks_gives_the_same_bits(tiny, alone, ranks):
    assert shown(play(tiny, f"ranks-{ranks}", ranks=ranks, start=launch)) == shown(alone)


def test_open_mpi_gives_the_same_bits(tiny, alone):
    assert shown(play(tiny, "openmpi", ranks=3, start=launch, mpi="openmpi")) == shown(alone)


@several
def test_weighted_by_examples_with_sampling_is_the_same_for_any_number_of_ranks(tiny):
    settings = ["method.weighting=examples", "clients.count=5", "clients.per_round=0.6", "run.rounds=2"]
    one, two = (play(tiny, f"weighted-{n}", *settings, ranks=n) for n in (1, 3))
    assert shown(one) == shown(two)
    assert [row["clients"] for row in shown(one)["rounds"]] == [0, 3, 3]


@several
def test_a_drawn_split_is_the_same_for_any_number_of_ranks_and_after_a_resume(tiny):
    settings = ["method.weighting=examples", "clients.split={kind: dirichlet, column: topic, alpha: 0.5}"]
    settings += ["data.columns={prompt: prompt, response: topic}", "evaluation.labels=[red, blue, green, black]"]
    settings += ["data.validation=0.6"]  # three batches, and accuracy depends on none of the ranks that share them
    whole = play(tiny, "drawn-whole", *settings, "run.rounds=2")
    parts = play(tiny, "drawn-parts", *settings, "run.rounds=1", ranks=3)
    within(["resume", parts, "run.rounds=2"], 2).ok()
    assert shown(parts) == shown(whole)
    assert shown(whole)["split"] == "dirichlet"
    splits = [checkpoint.newest(run, pytest.fail)[1].about["data"]["split"] for run in (whole, parts)]
    assert splits[0] == splits[1]
    sizes = [sum(rows) for rows in splits[0]["rows"]]
    assert sum(sizes) == 18 and max(sizes) > 6
    assert all(0 <= row["eval_accuracy"] <= 1 for row in shown(whole)["rounds"])


def test_gathered_adapters_average_to_what_the_exact_sum_gives(tiny, kept):
    # one round: over more, Adam makes much of differences in the last bits
    gathered = play(tiny, "gathered-1", "run.rounds=1", f"method.name={METHODS / 'gathering.py'}")
    one, two = (checkpoint.read(run / "round-000001.h5").server["weights"].vector for run in (kept, gathered))
    assert not np.array_equal(one, np.zeros_like(one))
    assert np.abs(one - two).max() < 1e-7


@several
@pytest.mark.parametrize(
    ("ranks", "settings"), [((2, 3), ()), ((3, 2), ("train.keep_optimizer=true", "model.adapter.dropout=0.1"))]
)
def test_resumed_run_gives_the_same_bits_and_files(tiny, ranks, settings):
    kind = "plain" if not settings else "keeping"
    whole = play(tiny, f"whole-{kind}", "run.rounds=4", *settings)
    parts = play(tiny, f"parts-{kind}", "run.rounds=2", *settings, ranks=ranks[0])
    result = within(["resume", parts, "run.rounds=4"], ranks[1]).ok()
    assert "changed since round 2: run.rounds 2 -> 4" in result.out
    assert shown(parts) == shown(whole)
    for run in (whole, parts):
        with (run / "metrics.csv").open() as file:
            assert [row["round"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4"]
    audits = [[json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()] for run in (whole, parts)]
    for one, two in zip(*audits, strict=True):
        differs = {key for key in one if one[key] != two[key]}
        assert differs <= {"config_sha256", "code"}  # the number of rounds, and a tree that is edited meanwhile


def test_a_server_that_trains_nothing_writes_a_base_that_has_changed(tiny):
    run = play(tiny, "flora-result", "method.name=flora", "run.rounds=1", ranks=3, start=launch)
    assert (run / "model" / "model.safetensors").is_file()


@several
def test_resume_from_an_older_round_file_takes_the_run_back(kept):
    run = kept.with_name("back")
    if first():
        shutil.copytree(kept, run)
    result = within(["resume", run / "round-000001.h5"], 2).ok()
    assert "takes the run back" in result.out
    assert shown(run) == shown(kept)


@several
def test_resume_of_a_run_that_is_done_changes_nothing(private):
    run = private
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for source in (run, run / "round-000003.h5"):
        assert "nothing to do: 3 of 3 rounds are done" in within(["resume", source], 2).ok().out
    older = within(["resume", run / "round-000002.h5", "run.rounds=2"]).ok()
    assert "nothing to do: 2 of 2 rounds are done" in older.out
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@several
def test_what_a_client_keeps_is_its_own(private):
    files = sorted((private / "clients").glob("*/*.h5"))
    assert {file.parent.name for file in files} == {"0000", "0001", "0002"}
    assert {file.name for file in files} == {"round-000002.h5", "round-000003.h5"}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    lines, whole = report.verify(private)
    assert whole
    assert "3 clients' files" in lines[0]


def test_run_directory_holds_what_is_promised(tiny, alone):
    names = {path.name for path in alone.iterdir()}
    assert names == {
        "config.yaml",
        "round-000002.h5",
        "round-000003.h5",
        "audit.jsonl",
        "metrics.csv",
        "log.txt",
        "adapter",
    }
    show = json.loads(within(["show", alone, "--json"]).ok().out)
    last = show["rounds"][-1]
    assert show["adapter_sha256"] == last["adapter_sha256"] == shown(alone)["rounds"][-1]["adapter_sha256"]
    assert last["bytes_up_per_client"] == last["bytes_down_per_client"] == 4 * show["trainable_parameters"]
    assert show["rounds_done"] == show["rounds_planned"] == 3
    assert set(last["seconds"]) == {"total", "train", "exchange", "server", "eval", "checkpoint"}
    assert show["test"]["loss"] < show["rounds"][0]["eval_loss"]


@several
def test_profile_is_written_by_the_ranks_that_train_and_changes_no_bit(tiny, kept):
    settings = ["run.profile=true", "run.rounds=2"]
    result = within(["run", tiny / "tiny.yaml", "run.name=profiled", *settings], 3).ok()
    run = tiny / "runs" / "profiled"
    assert f"traced: {run}/profile/rank-*-round-000002.json.gz" in result.out and result.err == ""
    resumed = within(["resume", run, "run.rounds=3"], 2).ok()
    assert f"traced: {run}/profile/rank-*-round-000003.json.gz" in resumed.out
    names = {"rank-0001-round-000002", "rank-0002-round-000002", "rank-0001-round-000003"}
    assert {path.name for path in (run / "profile").iterdir()} == {f"{name}.json.gz" for name in names}
    for path in (run / "profile").iterdir():
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert "aten::mm" in names and any("Backward" in str(name) for name in names)
    assert shown(run) == shown(kept)
    assert report.verify(run)[1]


def test_ranks_say_how_much_memory_they_held(quiet):
    rows = report.summary(quiet[1])["rounds"]
    held = rows[1]["peak_memory"]
    assert list(held) == ["0", "1", "2"] and all(held.values())
    assert rows[1]["peak_memory_client"] == max(held["1"], held["2"]) and rows[1]["tokens_per_second"] > 0


def test_verify_finds_what_is_damaged(tiny):
    run = play(tiny, "damaged", "run.rounds=2")
    assert within(["verify", run]).code == 0
    newest = run / "round-000002.h5"
    data = bytearray(newest.read_bytes())
    data[data.index(checkpoint.read(newest).server["weights"].buffer.tobytes()[:64])] ^= 0xFF
    newest.write_bytes(data)
    result = within(["verify", run])
    assert result.code == 1
    assert "round-000002.h5: damaged" in result.out
    assert "round-000001.h5: whole" in result.out
    resumed = within(["resume", run]).ok()
    assert "round-000002.h5" in resumed.out and "trying the one before" in resumed.out
    assert within(["verify", run]).code == 0


def test_one_file_a_client_and_nobody_reads_anothers(tiny, tmp_path):
    rows = tiny_rows(60)
    for client in range(3):
        write_rows(tmp_path / f"site-{client}.jsonl", rows[20 * client : 20 * client + 20])
    split = f"clients.split={{kind: files, files: '{tmp_path}/site-*.jsonl'}}"
    settings = [split, "clients.boundary=site", "run.rounds=2"]
    one = play(tiny, "files-1", *settings)
    (tmp_path / "spy.py").write_text(SPY.format(directory=tmp_path))
    four = play(tiny, "files-3", *settings, ranks=4, start=launch, program=(tmp_path / "spy.py",))
    assert shown(one) == shown(four)
    opened = {path.stem: path.read_text() for path in tmp_path.glob("opened-*.txt")}
    assert opened["opened-0"] == ""
    for rank in (1, 2, 3):
        assert f"site-{rank - 1}.jsonl" in opened[f"opened-{rank}"]
        assert not any(f"site-{other}.jsonl" in opened[f"opened-{rank}"] for other in range(3) if other != rank - 1)


SPY = """# runs gdmpi and notes which sites' files the rank opens, through Python's audit hook
import os, sys
note = open('{directory}/opened-' + os.environ['PMI_RANK'] + '.txt', 'w')
def hook(event, args):
    if event == 'open' and os.path.basename(str(args[0])).startswith('site-') and str(args[0]).endswith('.jsonl'):
        note.write(str(args[0]) + ' ')
        note.flush()
sys.addaudithook(hook)
from gdmpi.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_output_without_a_terminal_is_plain_lines_and_nothing_else(quiet, alone):
    result, run = quiet
    assert shown(run) == shown(alone)
    assert result.err == ""
    assert "\r" not in result.out and "\x1b" not in result.out
    lines = result.out.splitlines()
    assert any(line.startswith("round 3/3  train ") for line in lines)
    assert not any("warning" in line.lower() for line in lines)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data and model beside the project")
def test_real_model_learns_from_real_texts(tmp_path):
    settings = [
        f"model.name={SHARED}/models/tinystories-656k",
        f"data.name={SHARED}/data/mental_health_qa_172.jsonl",
        "data.max_length=128",
        "run.rounds=2",
        "train.lr=5e-3",
        f"run.out={tmp_path}",
        f"run.cache={tmp_path}/cache",
    ]
    within(["run", *settings]).ok()
    losses = [row["eval_loss"] for row in shown(tmp_path / "demo")["rounds"]]
    assert losses[2] < losses[1] < losses[0] - 0.2


def test_demo_from_its_bare_command(tmp_path):
    result = launch([], 6, cwd=tmp_path, timeout=200).ok()
    losses = [row["eval_loss"] for row in shown(tmp_path / "runs" / "demo")["rounds"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 3
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert result.out.count("python -m gdmpi") >= 3  # what is worth typing next
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
    assert not (tmp_path / "cache" / "bases").exists()  # its base is mapped as it is saved
