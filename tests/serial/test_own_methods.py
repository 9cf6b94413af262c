"""A method in a file of one's own: found from any directory, known by its hash, and kept to."""

import hashlib
import json
import shutil
import types
from pathlib import Path

import pytest
import synthetic
from conftest import launch

from gdmpi import build, checkpoint, commands, compare, config as configuration, method, report, results
from gdmpi.errors import UserError

GATHERING = Path(__file__).resolve().parent.parent / "methods" / "gathering.py"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with mine.py, from which the program is started; what was loaded from it is forgotten."""
    shutil.copyfile(GATHERING, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    method._load_file.cache_clear()
    yield tmp_path
    method._load_file.cache_clear()


def edited(path):
    path.write_text(path.read_text() + "# another thought\n")
    method._load_file.cache_clear()


@pytest.fixture(scope="module")
def played(tiny, tmp_path_factory):
    """The directory of a run with mine.py, named as it is there, resumed from somewhere else; and where mine.py is."""
    place = tmp_path_factory.mktemp("own")
    shutil.copyfile(GATHERING, place / "mine.py")
    words = ["method.name=mine.py", "run.name=own", "run.rounds=1"]
    launch(["run", tiny / "tiny.yaml", *words], cwd=place).ok()
    launch(["resume", tiny / "runs" / "own", "run.rounds=2"], 2, cwd=tiny).ok()
    return tiny / "runs" / "own", place


@pytest.fixture
def run(played, tmp_path):
    """A copy of that run, whose method's file may be changed."""
    directory, place = (Path(shutil.copytree(each, tmp_path / each.name)) for each in played)
    for path in checkpoint.files(directory):
        state = checkpoint.read(path)
        state.config = state.config.replace(str(played[1]), str(place))
        checkpoint.write(directory, state)
    method._load_file.cache_clear()
    yield directory, place / "mine.py"
    method._load_file.cache_clear()


def resumed(directory, *words):
    return commands._resumed(directory, checkpoint.newest(directory, pytest.fail)[1], list(words))


def test_path_leads_to_the_file_from_any_directory(place, monkeypatch):
    for name in ("mine.py", "./mine.py"):
        config = configuration.load(None, [f"method.name={name}"])
        assert Path(config.method.name) == place / "mine.py"
    monkeypatch.chdir("/")
    assert configuration.load(base=config.plain()) == config
    assert configuration.load(None, ["method.name=fedavg"]).method.name == "fedavg"


def test_hash_is_of_the_bytes_that_run(place):
    assert method.sha256("mine.py") == hashlib.sha256(GATHERING.read_bytes()).hexdigest()
    assert method.sha256("gradualdiff") is None
    first = method.load("mine.py").Options
    (place / "mine.py").write_text(GATHERING.read_text().replace('"""None."""', "beta: int = 3"))
    method._load_file.cache_clear()  # as in a new process, in the same second
    assert "beta" in method.load("mine.py").Options.model_fields and not first.model_fields


def test_file_may_use_what_looks_into_its_module(place):
    kept = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Kept:\n    x: int\n"
    )
    (place / "mine.py").write_text(kept + GATHERING.read_text().partition('"""\n')[2])
    assert method.load("mine.py").Kept(3).x == 3


def test_run_is_resumed_elsewhere_and_carries_the_hash_of_its_method(played):
    directory, place = played
    digest = hashlib.sha256((place / "mine.py").read_bytes()).hexdigest()
    assert [json.loads(line)["method_sha256"] for line in (directory / "audit.jsonl").open()] == [digest] * 3
    assert report.summary(directory)["method_sha256"] == digest
    assert f"own: mine.py (SHA-256 {digest[:12]}) on" in report.show(directory)
    assert report.verify(directory)[1]
    assert not (place / "__pycache__").exists()


def test_run_of_a_method_of_this_package_has_no_such_hash(tmp_path):
    run = synthetic.write_run(tmp_path / "ours", [synthetic.row(0, 5.0)])
    assert report.summary(run)["method_sha256"] is None
    assert "ours: gradualdiff on" in report.show(run)


def test_changed_file_is_refused_in_one_line_and_the_run_can_still_be_read(run):
    directory, path = run
    assert resumed(directory, "run.rounds=3")[1] == {"run.rounds": (2, 3)}
    edited(path)
    state = checkpoint.newest(directory, pytest.fail)[1]
    for refused in (lambda: resumed(directory, "run.rounds=3"), lambda: results.server_of(state)):
        with pytest.raises(UserError, match=r"mine\.py is not the file that the run began with") as caught:
            refused()
        assert "\n" not in str(caught.value)
    again = configuration.load(None, [f"method.name={path}"])
    with pytest.raises(UserError, match="or start a new run"):
        commands._continued(again, state)
    assert "2 of 2 rounds done" in report.show(directory)


def test_moved_file_is_named_and_must_be_the_same(run):
    directory, path = run
    path = path.rename(path.with_name("moved.py"))
    with pytest.raises(UserError, match=r"there is no file .*mine\.py"):
        resumed(directory, "run.rounds=3")
    assert "2 of 2 rounds done" in report.show(directory)
    config, changes = resumed(directory, "run.rounds=3", f"method.name={path}")
    assert config.method.name == str(path) and changes == {"run.rounds": (2, 3)}
    edited(path)
    with pytest.raises(UserError, match=r"moved\.py is not the file"):
        resumed(directory, "run.rounds=3", f"method.name={path}")
    with pytest.raises(UserError, match=r"method\.name: cannot change|there is no file"):
        resumed(directory, "method.name=fedavg")


def test_ranks_with_different_files_of_one_name_do_not_begin(place):
    config = configuration.load(None, ["method.name=mine.py", f"run.cache={place / 'cache'}"])
    link = types.SimpleNamespace(
        workers=[1], rank=0, host="a", is_worker=False, is_server=True, agree=lambda mine: [mine, ("b", True)]
    )
    with pytest.raises(UserError, match=r"mine\.py is not the same file on all ranks' hosts"):
        build.build(link, config)


def test_runs_of_one_path_and_two_contents_are_two_methods(tmp_path):
    for name in "ab":
        rows = [synthetic.row(0, 5.0), synthetic.row(1, 4.0)]
        known = synthetic.about(method_sha256=name * 64)
        synthetic.write_run(tmp_path / name, rows, f"run.seed={ord(name)}", known=known)
    text, _ = compare.show([tmp_path / "a", tmp_path / "b"])
    assert f"method_sha256  {'a' * 64} | {'b' * 64}" in text
