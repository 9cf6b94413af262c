"""Round files: what is written comes back, the format is the documented one, and no damage goes unnoticed."""

import errno
import inspect
import json
import os
import random
import re
import stat

import h5py
import numpy as np
import pytest
from conftest import launch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from gdmpi import checkpoint, flat
from gdmpi.errors import UserError


def described(state):
    """All of a Round as text: equal texts are equal rounds, to the bit and to the order of a vector's tensors."""
    import numpy as np

    def array(value):
        value = np.asarray(value)
        return f"{value.dtype.str}{value.shape}{value.tobytes().hex()}"

    server = {
        name: ["flat", *(f"{part} {array(tensor)}" for part, tensor in value.items())]
        if hasattr(value, "schema")
        else array(value)
        for name, value in sorted(state.server.items())
    }
    rest = {name: value for name, value in vars(state).items() if name != "server"}
    return repr((sorted(rest.items()), server))


def example(t=3, seed=0):
    """A small Round of which no two fields hold the same."""
    draw = np.random.default_rng(seed)
    weights = {"b.lora_A": draw.standard_normal((2, 3)), "a.lora_B": draw.standard_normal((4,))}
    return checkpoint.Round(
        round=t,
        adapter_sha256="ab01" * 16,
        config="run:\n  name: example\n",
        server={
            "weights": flat.pack({name: array.astype(np.float32) for name, array in weights.items()}),
            "asked": np.arange(3),
            "count": np.float32(7.5),
        },
        metrics=[{"round": 0, "train_loss": None}, {"round": 1, "train_loss": 0.1}],
        history=[{"round": 1, "changes": {"train.lr": [0.1, 0.2]}}],
        about={"model": "demo", "rows": {"0": 5}},
        adapter_config='{"r": 8}',
        clients={"1": {"file": "clients/0001/round-000003.h5", "sha256": "cd" * 32}},
    )


@pytest.fixture
def written(tmp_path):
    """A directory that holds the example's round file."""
    checkpoint.write(tmp_path, example())
    return tmp_path / checkpoint.name(3)


def refused(path, *says):
    """Reading is refused in one line that names the file; returns the line."""
    with pytest.raises(UserError) as caught:
        checkpoint.read(path)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{path}: ")
    for text in says:
        assert text in line
    return line


# ---- what is written comes back -------------------------------------------------------------------------------------

NAMES = st.text("abcXYZ019._-é ", min_size=1, max_size=12).filter(lambda name: name.strip("."))
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
JSON = st.dictionaries(TEXTS, LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(TEXTS, LEAVES, max_size=2))
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
TYPES = st.sampled_from(["f4", "f8", "f2", "i4", "i8", "u1", "u8", "?"])
PLAIN = TYPES.flatmap(lambda dtype: arrays.arrays(dtype, SHAPES))
VECTORS = st.dictionaries(NAMES, arrays.arrays("f4", SHAPES), max_size=3).map(flat.pack)
ROUNDS = st.builds(
    checkpoint.Round,
    round=st.integers(0, 10**6),
    adapter_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    config=TEXTS,
    server=st.dictionaries(NAMES, PLAIN | VECTORS, max_size=4),
    metrics=st.lists(JSON, max_size=3),
    history=st.lists(JSON, max_size=2),
    about=JSON,
    adapter_config=TEXTS,
    clients=JSON,
)


@settings(max_examples=40, deadline=None)
@given(state=ROUNDS)
def test_round_file_gives_back_every_field_to_the_bit(tmp_path_factory, state):
    directory = tmp_path_factory.mktemp("round")
    checkpoint.write(directory, state)
    (path,) = directory.iterdir()
    assert path.name == f"round-{state.round:06d}.h5"
    assert described(checkpoint.read(path)) == described(state)


@settings(max_examples=15, deadline=None)
@given(kept=st.dictionaries(NAMES, PLAIN, max_size=3), client=st.integers(0, 99999))
def test_client_file_gives_back_every_array(tmp_path_factory, kept, client):
    directory = tmp_path_factory.mktemp("clients")
    digest = checkpoint.write_client(directory, client, 4, kept)
    back = checkpoint.read_client(directory, client, 4, digest)
    assert back.keys() == kept.keys()
    for name, array in kept.items():
        assert np.asarray(back[name]).dtype == array.dtype
        assert np.asarray(back[name]).tobytes() == array.tobytes() and np.shape(back[name]) == array.shape


def test_nan_and_infinity_survive(tmp_path):
    state = example()
    state.server = {"odd": np.float32([np.nan, np.inf, -np.inf, -0.0])}
    state.metrics = [{"eval_perplexity": float("inf")}]
    checkpoint.write(tmp_path, state)
    assert described(checkpoint.read(tmp_path / checkpoint.name(3))) == described(state)


def test_no_metrics_no_history_no_server(tmp_path):
    state = checkpoint.Round(0, "0" * 64, "", {})
    checkpoint.write(tmp_path, state)
    assert described(checkpoint.read(tmp_path / checkpoint.name(0))) == described(state)


# ---- the format is what the docstring says --------------------------------------------------------------------------


def documented(heading):
    """The names that a section of checkpoint.py's docstring lists, one a line at its left."""
    section = checkpoint.__doc__.partition(heading)[2].partition("\n")[2]
    lines = []
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        lines.append(line)
    return {found[1] for line in lines if (found := re.match(r"    (\S+)\s{2,}\S", line))}


def test_file_holds_what_is_documented_and_nothing_else(written):
    attributes, data = documented("Attributes of the root"), documented("Data sets (each")
    assert {"format", "complete"} <= attributes and "server/NAME" in data  # the docstring was understood
    with h5py.File(written) as file:
        assert set(file.attrs) == attributes
        assert set(file) == {name.partition("/")[0] for name in data}
        assert set(file["server"]) == set(example().server)
        assert set(file["server/weights"].attrs) == {"order"}
        assert json.loads(file["server/weights"].attrs["order"]) == ["b.lora_A", "a.lora_B"]
        found = {}
        file.visititems(lambda name, item: found.update({name: item}))
        sets = {name: item for name, item in found.items() if isinstance(item, h5py.Dataset)}
        assert all(set(item.attrs) == {"sha256"} for item in sets.values())
        assert all(not item.attrs for name, item in found.items() if name not in sets and name != "server/weights")
        assert all(file[f"server/weights/{name}"].dtype == "<f4" for name in ("b.lora_A", "a.lora_B"))
        assert bool(file.attrs["complete"]) is True
        assert file.attrs["version"] == 1 and file.attrs["round"] == 3
        texts = {name: file.attrs[name] for name in ("format", "creator", "adapter_sha256")}
    texts = {name: text.decode() if isinstance(text, bytes) else text for name, text in texts.items()}
    assert texts["format"] == "gdmpi round" and texts["creator"].startswith("gdmpi 0.")
    assert texts["adapter_sha256"] == "ab01" * 16


def test_hashes_of_the_data_sets_are_over_their_bytes(written):
    import hashlib

    with h5py.File(written) as file:
        for name in ("server/asked", "server/count", "server/weights/b.lora_A"):
            assert file[name].attrs["sha256"].decode() == hashlib.sha256(file[name][()].tobytes()).hexdigest()
        assert file["config"].attrs["sha256"].decode() == hashlib.sha256(file["config"][()]).hexdigest()


def test_client_file_holds_what_is_documented_and_nothing_else(tmp_path):
    checkpoint.write_client(tmp_path, 7, 2, {"train.first": np.ones(3, np.float32), "train.count": np.float32(1)})
    sentence = checkpoint.__doc__.partition("A client's file")[2].partition("\n\n")[0]
    named = re.search(r'has format "gdmpi client",(.*?),\s+and the', sentence, re.S)[1]
    with h5py.File(tmp_path / "0007" / "round-000002.h5") as file:
        assert set(file.attrs) == {"format", *(name.strip() for name in named.split(","))}
        assert set(file) == {"train.first", "train.count"}
        assert (file.attrs["client"], file.attrs["round"]) == (7, 2)


# ---- damage ---------------------------------------------------------------------------------------------------------

READ_ALL = """
import sys
from gdmpi import checkpoint
from gdmpi.errors import UserError
for path in sys.argv[1:]:
    print(path, flush=True)  # should the HDF5 library crash, it is known over which file
    try:
        print("read", described(checkpoint.read(path)))
    except UserError as error:
        print("refused", repr(str(error)))
    except Exception as error:
        print("raised", repr(error))
print("done")
"""


def read_all(paths):
    """[(path, what reading it came to)], in a process of its own: damaged metadata can crash the HDF5 library."""
    program = inspect.getsource(described) + READ_ALL
    result = launch(paths, program=("-c", program))
    lines = result.out.splitlines()
    assert lines[-1] == "done", f"exit {result.code} over {lines[-1]}: {result.err[-500:]}"
    return list(zip(lines[:-1:2], lines[1:-1:2], strict=True))


def test_no_flipped_byte_and_no_cut_goes_unnoticed(written, tmp_path):
    whole = written.read_bytes()
    draw = random.Random(1)
    places = set(draw.sample(range(len(whole)), 30)) | set(range(0, 96, 12))
    # what a random byte hits too seldom: hashes, names, values and marks
    for text in (b"ab01ab01", b"gdmpi round", b"weights", b"asked", b"b.lora_A", b"complete", b"train_loss"):
        assert text in whole
        places |= {found.start() + 5 for found in re.finditer(text, whole)}
    places |= {found.start() for found in re.finditer(re.escape(np.float32(7.5).tobytes()), whole)}
    damaged = {}
    for place in sorted(places):
        for mask in (0xFF, 0x01):
            data = bytearray(whole)
            data[place] ^= mask
            damaged[f"byte-{place}-{mask}"] = data
    for length in (0, 1, 8, 96, len(whole) // 3, len(whole) // 2, len(whole) - 512, len(whole) - 1):
        damaged[f"cut-{length}"] = whole[:length]
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    expected = f"read {described(example())}"
    outcomes = read_all([written, *sorted(folder.iterdir())])
    assert outcomes[0] == (str(written), expected)
    wrong = {}
    for path, said in outcomes[1:]:
        fine = said == expected and "/cut-" not in path  # the byte is used for nothing
        if not fine and not (said.startswith("refused") and path in said and "\\n" not in said):
            wrong[path.rpartition("/")[2]] = said[:150]
    assert not wrong
    assert sum(said.startswith("refused") for _, said in outcomes) > 20


def test_newer_version_is_named(written):
    with h5py.File(written, "r+") as file:
        file.attrs["version"] = 2
    refused(written, "format version 2", "reads up to 1")


def test_older_version_is_brought_up_to_date(written, monkeypatch):
    # as if this program wrote version 3, where what was called clients in 1 has got a new field since 2
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    monkeypatch.setattr(
        checkpoint,
        "UPGRADES",
        {
            1: ("2027-01-01", lambda old: old | {"about": old["about"] | {"tongue": "en"}}),
            2: ("2027-02-02", lambda old: old | {"about": old["about"] | {"tongue": old["about"]["tongue"] * 2}}),
        },
    )
    state = checkpoint.read(written)
    assert state.about == example().about | {"tongue": "enen"}
    assert described(state) != described(example())
    with h5py.File(written, "r+") as file:
        file.attrs["version"] = 0
    refused(written, "format version 0", "reads up to 3")


def test_every_older_version_has_a_dated_upgrade():
    assert sorted(checkpoint.UPGRADES) == list(range(1, checkpoint.VERSION))
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", date) for date, _ in checkpoint.UPGRADES.values())


def test_newer_client_file_is_named(tmp_path):
    checkpoint.write_client(tmp_path, 1, 2, {"a": np.ones(2)})
    path = checkpoint.client_path(tmp_path, 1, 2)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(UserError, match="format version 2") as caught:
        checkpoint.read_client(tmp_path, 1, 2, checkpoint.file_sha256(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("attribute", ["complete", "version", "format", "round", "adapter_sha256"])
def test_missing_attribute_is_refused(written, attribute):
    with h5py.File(written, "r+") as file:
        del file.attrs[attribute]
    refused(written, *{"complete": ["cut off"], "format": ["gdmpi round"]}.get(attribute, []))


@pytest.mark.parametrize("item", ["metrics", "config", "server", "server/weights/b.lora_A", "clients"])
def test_missing_data_set_is_refused(written, item):
    with h5py.File(written, "r+") as file:
        del file[item]
    refused(written, "damaged")


def test_another_value_under_the_old_hash_is_refused(written):
    with h5py.File(written, "r+") as file:
        file["server/weights/b.lora_A"][0, 0] += 1
    refused(written, "/server/weights/b.lora_A", "checksum")


def test_tensor_that_the_order_does_not_name_is_refused(written):
    with h5py.File(written, "r+") as file:
        file["server/weights"].attrs["order"] = '["b.lora_A"]'
    refused(written, "order")


def test_files_of_others_are_refused(tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    refused(tmp_path / "text.h5", "no HDF5")
    (tmp_path / "empty.h5").write_bytes(b"")
    refused(tmp_path / "empty.h5")
    (tmp_path / "folder.h5").mkdir()
    refused(tmp_path / "folder.h5")
    refused(tmp_path / "nowhere.h5", "no such file")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["temperature"] = np.arange(3.0)
    refused(tmp_path / "other.h5", "not a file of the format 'gdmpi round'")
    checkpoint.write_client(tmp_path, 1, 3, {"a": np.ones(2)})
    refused(checkpoint.client_path(tmp_path, 1, 3), "not a file of the format 'gdmpi round'")


# ---- which files there are ------------------------------------------------------------------------------------------


def test_newest_falls_back_and_names_the_damaged_one(tmp_path):
    for t in (1, 2, 10):
        checkpoint.write(tmp_path, example(t))
    newest = tmp_path / checkpoint.name(10)
    newest.write_bytes(newest.read_bytes()[:-100])
    said = []
    path, state = checkpoint.newest(tmp_path, said.append)
    assert (path.name, state.round) == ("round-000002.h5", 2)
    assert len(said) == 1 and str(newest) in said[0] and "\n" not in said[0]
    with h5py.File(tmp_path / checkpoint.name(2), "r+") as file:
        file.attrs["version"] = 9  # whole, only not for us: going on from an older round would take the run back
    with pytest.raises(UserError, match="format version 9"):
        checkpoint.newest(tmp_path, said.append)
    for path in checkpoint.files(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 3 round files is whole"):
        checkpoint.newest(tmp_path, said.append)
    assert len(said) == 5


def test_directory_without_round_files(tmp_path):
    with pytest.raises(UserError, match="no round files here"):
        checkpoint.newest(tmp_path, pytest.fail)


def test_left_over_part_file_confuses_nothing(tmp_path):
    part = tmp_path / "round-000003.h5.part"
    part.write_bytes(b"cut off")
    (tmp_path / "round-000004.h5.part").write_bytes(b"cut off")
    assert checkpoint.files(tmp_path) == []
    checkpoint.write(tmp_path, example())
    assert not part.exists()
    assert checkpoint.newest(tmp_path, pytest.fail)[1].round == 3
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.files(tmp_path)] == ["round-000003.h5"]


@pytest.mark.parametrize("what", ["open", "data set", "attribute", "fsync", "replace"])
def test_failed_write_changes_nothing(written, monkeypatch, what):
    before = written.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {
        "open": (h5py, "File"),
        "data set": (h5py.Group, "create_dataset"),
        "attribute": (h5py.AttributeManager, "__setitem__"),
        "fsync": (os, "fsync"),
        "replace": (type(written), "replace"),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(written.parent, example(seed=1))
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    assert written.read_bytes() == before


def test_writing_again_replaces_the_file(written):
    checkpoint.write(written.parent, example(seed=1))
    assert described(checkpoint.read(written)) == described(example(seed=1)) != described(example())


def test_prune_keeps_the_newest(tmp_path):
    for t in (8, 9, 10, 11):
        checkpoint.write(tmp_path, example(t))
    (tmp_path / "metrics.csv").write_text("mine")
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "round-000010.h5", "round-000011.h5"]


# ---- what a client keeps --------------------------------------------------------------------------------------------


def test_client_files_are_their_owners_alone(tmp_path):
    umask = os.umask(0)
    try:
        checkpoint.write_client(tmp_path / "clients", 3, 1, {"a": np.ones(2)})
    finally:
        os.umask(umask)
    path = tmp_path / "clients" / "0003" / "round-000001.h5"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_client_file_with_another_hash_or_none_is_refused(tmp_path):
    digest = checkpoint.write_client(tmp_path, 3, 1, {"a": np.ones(2)})
    path = checkpoint.client_path(tmp_path, 3, 1)
    assert digest == checkpoint.file_sha256(path)
    checkpoint.write_client(tmp_path, 3, 1, {"a": np.zeros(2)})
    with pytest.raises(UserError, match="its hash differs") as caught:
        checkpoint.read_client(tmp_path, 3, 1, digest)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="missing; round 1 cannot be resumed"):
        checkpoint.read_client(tmp_path, 3, 1, digest)


def test_prune_of_client_files_keeps_what_a_resume_needs(tmp_path):
    for t in (1, 2, 3):
        checkpoint.write_client(tmp_path / "clients", 3, t, {"a": np.ones(2)})
    checkpoint.write_client(tmp_path / "clients", 4, 1, {"a": np.ones(2)})
    checkpoint.prune_clients(tmp_path, 2, 3)
    left = sorted(str(path.relative_to(tmp_path / "clients")) for path in tmp_path.glob("clients/*/*"))
    assert left == ["0003/round-000002.h5", "0003/round-000003.h5", "0004/round-000001.h5"]


# ---- files that are written over ------------------------------------------------------------------------------------


def first_written(directory, arrays):
    """Write a client's file of round 1; returns it as the list of files that are not needed."""
    checkpoint.write_client(directory, 3, 1, arrays)
    return [checkpoint.client_path(directory, 3, 1)]


def test_file_that_is_not_needed_is_written_over(tmp_path):
    old = {"train.m": np.arange(4, dtype=np.float32), "method.v": flat.pack({"a": np.ones(2, np.float32)})}
    new = {"train.m": np.full(4, 7, np.float32), "method.v": flat.pack({"a": np.zeros(2, np.float32)})}
    over = first_written(tmp_path, old)
    place, size = over[0].stat().st_ino, over[0].stat().st_size
    digest = checkpoint.write_client(tmp_path, 3, 4, new, over)
    path = checkpoint.client_path(tmp_path, 3, 4)
    assert sorted(path.parent.iterdir()) == [path]
    assert (path.stat().st_ino, path.stat().st_size) == (place, size)
    with h5py.File(path) as file:
        assert file.attrs["complete"] and file.attrs["round"] == 4
    found = checkpoint.read_client(tmp_path, 3, 4, digest)
    assert {key: str(value) for key, value in found.items() if key != "method.v"} == {"train.m": str(new["train.m"])}
    assert found["method.v"]["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "arrays",
    [
        {"train.m": np.ones(5, np.float32)},
        {"train.m": np.ones(4)},
        {"train.n": np.ones(4, np.float32)},
        {"train.m": np.ones(4, np.float32), "train.n": np.ones(4, np.float32)},
        {},
    ],
    ids=["shape", "type", "name", "more", "none"],
)
def test_file_of_other_arrays_is_not_written_over(tmp_path, arrays):
    over = first_written(tmp_path, {"train.m": np.zeros(4, np.float32)})
    digest = checkpoint.write_client(tmp_path, 3, 4, arrays, over)
    assert over[0].exists()
    found = checkpoint.read_client(tmp_path, 3, 4, digest)
    assert {key: (value.dtype, value.tolist()) for key, value in found.items()} == {
        key: (value.dtype, value.tolist()) for key, value in arrays.items()
    }


def test_damaged_file_is_not_written_over(tmp_path):
    over = first_written(tmp_path, {"a": np.zeros(4)})
    with h5py.File(over[0], "r+") as file:
        file.attrs.modify("complete", False)
    digest = checkpoint.write_client(tmp_path, 3, 4, {"a": np.ones(4)}, over)
    assert over[0].exists()
    assert checkpoint.read_client(tmp_path, 3, 4, digest)["a"].tolist() == [1] * 4


def test_file_that_is_written_over_has_no_name_until_it_is_whole(tmp_path, monkeypatch):
    over, seen = first_written(tmp_path, {"a": np.zeros(4)}), []

    def cut_off(value):
        monkeypatch.undo()
        part = checkpoint.client_path(tmp_path, 3, 4).with_name("round-000004.h5.part")
        seen.append((over[0].exists(), part.exists()))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_digest", cut_off)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_client(tmp_path, 3, 4, {"a": np.ones(4)}, over)
    assert seen == [(False, True)]  # no name that stands for a whole file
    assert list((tmp_path / "0003").iterdir()) == []
