"""verify recomputes every hash of a run and names what is damaged."""

import json
import shutil

import numpy as np
import pytest
from synthetic import row, write_run

from gdmpi import checkpoint, config as configuration, report
from gdmpi.errors import UserError

# ---- verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The directory of a finished run of two rounds whose two clients keep their moments."""
    from mpi4py import MPI

    from gdmpi import log, mpi, run

    out = tmp_path_factory.mktemp("verify")
    words = ["clients.count=2", "run.rounds=2", "train.steps=1", "train.keep_optimizer=true", "run.name=run"]
    config = configuration.load(tiny / "tiny.yaml", [*words, f"run.out={out}"])
    run.play(mpi.Link(MPI.COMM_SELF), config, log.Log(False))
    return config.directory


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run, to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def test_whole_run_is_said_to_be_whole(copy):
    lines, whole = report.verify(copy)
    assert whole, lines
    assert [line.partition(":")[0] for line in lines] == [
        *("round-000002.h5", "round-000001.h5", "metrics.csv", "audit.jsonl", "adapter")
    ]
    assert all("whole" in line or "agrees" in line for line in lines)


def edit(change):
    """A damage that rewrites a text file's lines."""

    def damage(path):
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return damage


def other_values(path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.float32(1e-6)
    save_file(tensors, path)


def fewer_tensors(path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)


def other_adapter(path):
    """A round file that is whole in itself, but whose adapter is not the one that it names."""
    state = checkpoint.read(path)
    state.server["weights"].vector[0] += 1
    checkpoint.write(path.parent, state)


def unlink(path):
    path.unlink()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def garble(path):
    path.write_bytes(b"\xff\xfe\x00garbled\n" + path.read_bytes())


LAST, ADAPTER = "clients/0001/round-000002.h5", "adapter/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "line", "says"),
    [
        ("round-000002.h5", cut, "round-000002.h5", "damaged"),
        ("round-000001.h5", cut, "round-000001.h5", "damaged"),
        ("round-000002.h5", other_adapter, "round-000002.h5", "does not have the hash that it records"),
        (LAST, unlink, "round-000002.h5", "what client 1 kept, is missing"),
        (LAST, flip, "round-000002.h5", "not the file that the round was committed with"),
        ("metrics.csv", unlink, "metrics.csv", "cannot be read"),
        ("metrics.csv", edit(lambda lines: lines[:-1]), "metrics.csv", "has the rounds 0, 1 where 0 to 2 are done"),
        ("metrics.csv", edit(lambda lines: lines + lines[-1:]), "metrics.csv", "has the rounds 0, 1, 2, 2"),
        ("metrics.csv", edit(lambda lines: lines[:1] + lines[2:]), "metrics.csv", "has the rounds 1, 2"),
        ("metrics.csv", edit(lambda lines: ["nonsense\n", *lines[1:]]), "metrics.csv", ""),
        ("metrics.csv", garble, "metrics.csv", ""),
        ("audit.jsonl", unlink, "audit.jsonl", "cannot be read"),
        ("audit.jsonl", cut, "audit.jsonl", "not JSON"),
        ("audit.jsonl", garble, "audit.jsonl", ""),
        ("audit.jsonl", edit(lambda lines: lines[1:]), "audit.jsonl", "does not have each of the rounds"),
        ("audit.jsonl", edit(lambda lines: lines + lines[-1:]), "audit.jsonl", "does not have each of the rounds"),
        ("audit.jsonl", edit(lambda lines: [*lines[:-1], "{}\n"]), "audit.jsonl", ""),
        ("audit.jsonl", edit(lambda lines: [*lines[:-1], "2\n"]), "audit.jsonl", ""),
        (ADAPTER, other_values, "adapter", "holds other values than round-000002.h5"),
        (ADAPTER, fewer_tensors, "adapter", "holds other values than round-000002.h5"),
        (ADAPTER, cut, "adapter", "cannot be read"),
    ],
)
def test_verify_names_the_damage(copy, file, damage, line, says):
    damage(copy / file)
    lines, whole = report.verify(copy)
    assert not whole
    assert not any("\n" in text for text in lines)
    (said,) = (text for text in lines if text.startswith(f"{line}: "))
    assert says in said and "agrees" not in said and "whole, " not in said
    if file.startswith(("metrics", "audit", "adapter")):
        assert sum("agrees" in text or "whole" in text for text in lines) == len(lines) - 1


def test_verify_compares_what_each_client_sent(copy):
    path = copy / "audit.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["sent"]["0"] = "0" * 64
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said, whole = report.verify(copy)
    assert not whole and any("says something else of round 1" in text for text in said)


def test_verify_of_a_run_that_is_not_over_is_fine(copy):
    shutil.rmtree(copy / "adapter")
    lines, whole = report.verify(copy)
    assert whole and lines[-1] == "adapter: not there yet: written after the last round"


@pytest.fixture
def answered(tmp_path):
    """answered(scores): the directory of a run of one round that was to answer 3 test prompts, and did if so."""

    def make(scores):
        rows = [row(0, 3.0), row(1, 2.0, test=1.5)]
        rows[-1]["test"] |= scores
        return write_run(tmp_path / "answered", rows, "evaluation.generate=3")

    return make


ANSWERS = [{"prompt": "a", "answer": "b\u2028c\x85", "reference": "", "row": n, "group": None} for n in range(3)]
TEXT = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ANSWERS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TEXT, "agrees with round-000001.h5"),
        (None, "cannot be read: No such file or directory"),
        (TEXT[: TEXT.index("\n") + 1], "has 1 lines, and 3 prompts were answered"),
        (2 * TEXT, "has 6 lines, and 3 prompts were answered"),
        (TEXT[:-9], "has a line that is not JSON"),
        (TEXT + "\n", "has a line that is not JSON"),
        (TEXT + "3\n", "has a line without prompt, answer, reference and row"),
        (TEXT.replace("answer", "answers", 1), "has a line without prompt, answer, reference and row"),
    ],
)
def test_verify_looks_whether_each_answer_is_there(answered, text, says):
    directory = answered({"generated": 3})
    if text is not None:
        (directory / "generated.jsonl").write_text(text, encoding="utf-8")
    lines, whole = report.verify(directory)
    assert lines[-1] == f"generated.jsonl: {says}" and whole == (text == TEXT)


def test_answers_that_are_not_there_yet_or_not_asked_for_are_no_damage(answered, copy):
    lines, whole = report.verify(answered({}))
    assert whole and lines[-1] == "generated.jsonl: not there yet: written after the last round"
    (copy / "generated.jsonl").write_text("of another run")
    assert not any("generated" in line for line in report.verify(copy)[0])


def test_verify_of_no_run(tmp_path):
    for path, says in ((tmp_path / "nowhere", "no such run directory"), (tmp_path, "no round files here")):
        with pytest.raises(UserError, match=says):
            report.verify(path)
    (tmp_path / "round-000001.h5").write_text("no HDF5")
    lines, whole = report.verify(tmp_path)
    assert not whole and lines[-1] == "no whole round file: this run cannot be resumed"
