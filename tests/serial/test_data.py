"""Data: every format reads the same, what carries loss is exactly the response, and each mistake has its own line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokens import BOS, PLAIN, ROWS, config, encoded, whole

from gdmpi import data, partition, rng
from gdmpi.config import UserError

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

SHARED = Path(os.environ.get("GDMPI_SHARED", Path(__file__).parents[3] / "shared"))


# ---- reading -------------------------------------------------------------------------------------------------------


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("kind", [*data.FORMATS, "saved", "saved-splits", "folder"])
def test_every_format_reads_the_same(tmp_path, kind):
    path = tmp_path / f"rows{kind if kind in data.FORMATS else ''}"
    if kind in data.FORMATS:
        write(path, ROWS)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "saved-splits":
        splits = {"train": datasets.Dataset.from_list(ROWS), "other": datasets.Dataset.from_list(ROWS[:3])}
        datasets.DatasetDict(splits).save_to_disk(path)
    else:
        path.mkdir()
        write(path / "part.jsonl", ROWS)
    table = data.read(str(path), config(), str(tmp_path / "cache"))
    assert table.column_names == ["prompt", "response", "topic"]
    assert table[:] == {key: [row[key] for row in ROWS] for key in ROWS[0]}


def test_a_csv_keeps_words_that_look_like_missing_values(tmp_path):
    name = write(tmp_path / "x.csv", [{"prompt": "NA", "response": "null"}, {"prompt": "a\nb", "response": ""}])
    assert data.read(name, config(), str(tmp_path))[:] == {"prompt": ["NA", "a\nb"], "response": ["null", ""]}


def test_named_splits_come_along(tmp_path):
    splits = {name: datasets.Dataset.from_list(ROWS[:n]) for name, n in (("train", 9), ("dev", 4), ("test", 2))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "rows")
    name = str(tmp_path / "rows")
    assert len(data.read(name, config(), None)) == 9
    settings = config(data={"name": name, "validation": "dev", "test": 0.3, "template": "plain"}, clients={"count": 2})
    prepared = data.prepare(settings, PLAIN)
    assert prepared.validation.index.tolist() == [9, 10, 11, 12]
    assert (len(prepared.test), sum(map(len, prepared.train.values()))) == (3, 6)
    with pytest.raises(UserError, match="data.test: 'final' is no split"):
        data.prepare(config(data={"name": name, "test": "final"}), PLAIN)
    del splits["train"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="has the splits dev, test but none called train"):
        data.read(str(tmp_path / "none"), config(), None)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": 2}\n{"a" 3}\n', r"^data.name: .*x.jsonl: line 3 is not valid JSON \(Expecting"),
        ("x.jsonl", b'{"a": "\xff"}\n', "line 1 is not valid JSON .not UTF-8 text"),
        ("x.json", b'[\n{"a": 1},\n{"a" 3}]', "x.json: line 3 is not valid JSON"),
        ("x.jsonl", b"", "x.jsonl: holds no rows"),
        ("x.json", b"[]", "x.json: holds no rows"),
        ("x.csv", b"prompt,response\n", "x.csv: holds no rows"),
        ("x.csv", b"", "x.csv: holds no rows"),
        ("x.parquet", b"nope", "x.parquet: cannot be read: Parquet"),
        ("x.txt", b"hello", "x.txt: unknown kind of file; known are .jsonl .json .csv .parquet"),
        (".", None, "cannot be read: "),
    ],
)
def test_unreadable_files(tmp_path, name, content, match, capfd):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        data.read(str(tmp_path / name), config(), str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_and_an_unreachable_hub(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data.name: no/x.jsonl: no such file or directory \(/.*/no/x.jsonl\)$"):
        data.read("no/x.jsonl", config(), None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    with pytest.raises(UserError, match=r"no such file or directory \(/.*who/what\), and the hub cannot be reached"):
        data.read("who/what", config(), str(tmp_path))


def test_the_import_is_light():
    heavy = "'torch', 'transformers', 'datasets', 'tokenizers', 'pandas'"
    code = f"import sys, gdmpi.data; print([name for name in ({heavy}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- rows and batches ----------------------------------------------------------------------------------------------


def test_rows_take_and_travel():
    rows, _, _ = encoded([{"prompt": "a" * (i + 1), "response": "b"} for i in range(6)])
    some = rows.take([4, 0, 4])
    assert some.index.tolist() == [4, 0, 4]
    for position, i in enumerate((4, 0, 4)):
        assert all(np.array_equal(a, b) for a, b in zip(some.row(position), rows.row(i), strict=True))
    back = data.Rows.from_arrays(rows.arrays())
    assert all(np.array_equal(array, back.arrays()[name]) for name, array in rows.arrays().items())
    assert [str(array.dtype) for array in rows.arrays().values()] == ["int32", "bool", "int64", "int64", "int64"]
    assert [str(array.dtype) for array in some.arrays().values()] == ["int32", "bool", "int64", "int64", "int64"]
    assert len(rows.take([])) == 0


def test_batches_and_padding():
    rows, _, _ = encoded([{"prompt": "ab" * i, "response": "b"} for i in range(7)])
    steps = data.batches(rows, 3, rng.stream(0, "test"))
    assert [len(step) for step in steps] == [3, 3, 1]
    assert sorted(np.concatenate(steps)) == list(range(7))
    assert not np.array_equal(np.concatenate(steps), np.concatenate(data.batches(rows, 3, rng.stream(1, "test"))))
    tokens, attention, target = data.pad(rows, [1, 5])
    assert (tokens.dtype, attention.dtype, target.dtype) == (np.int64, np.int64, bool)
    for position, i in enumerate((1, 5)):
        row, carries = rows.row(i)
        assert attention[position].tolist() == [1] * len(row) + [0] * (tokens.shape[1] - len(row))
        assert np.array_equal(tokens[position][: len(row)], row)
        assert np.array_equal(target[position][: len(row)], carries)
    assert tokens[0, -1] == 0
    assert not target[0, -1]


# ---- from the configuration to rows --------------------------------------------------------------------------------


@pytest.fixture
def pooled(tmp_path):
    def make(rows=ROWS, clients=3, split=None, seed=0, **section):
        name = write(tmp_path / "rows.jsonl", rows)
        run = {"cache": str(tmp_path / "cache"), "seed": seed}
        clients = {"count": clients, "split": split or {"kind": "iid"}}
        return config(data={"name": name, "template": "plain"} | section, clients=clients, run=run)

    return make


def test_prepare(pooled):
    prepared = data.prepare(pooled(), PLAIN)
    parts = [*prepared.train.values(), prepared.validation, prepared.test]
    assert [len(part) for part in parts] == [8, 8, 8, 3, 3]
    assert sorted(np.concatenate([part.index for part in parts])) == list(range(30))
    assert prepared.report["clients"] == {0: 8, 1: 8, 2: 8}
    assert prepared.report["train"]["rows"] == 24
    assert json.loads(json.dumps(prepared.report))["template"] == "plain"
    again = data.prepare(pooled(), PLAIN)
    assert np.array_equal(prepared.train[1].tokens, again.train[1].tokens)
    longer = data.prepare(pooled(validation=0.0), BOS)
    assert len(longer.validation) == 0
    assert np.array_equal(longer.test.index, prepared.test.index)


SPLITS = {
    "iid": {"kind": "iid"},
    "by": {"kind": "by", "column": "topic"},
    "by-group": {"kind": "by", "column": "who"},
    "dirichlet": {"kind": "dirichlet", "column": "topic", "alpha": 0.3},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_no_group_crosses_training_validation_and_test(pooled, split, seed):
    rows = [row | {"who": f"patient {i // 3}"} for i, row in enumerate(ROWS)]
    prepared = data.prepare(pooled(rows, split=split, seed=seed, group="who"), PLAIN)
    train = np.concatenate([part.index for part in prepared.train.values()])
    parts = [{i // 3 for i in part} for part in (train, prepared.validation.index, prepared.test.index)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 10
    assert prepared.report["groups"] == 10


def test_no_group_crosses_the_parts_of_a_clients_file(tmp_path):
    rows = [row | {"who": f"patient {i // 3}"} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "site.jsonl", rows)
    clients = {"count": 1, "split": {"kind": "files", "files": path}}
    settings = config(clients=clients, data={"group": "who", "template": "plain"}, run={"cache": str(tmp_path / "c")})
    parts = [{i // 3 for i in part.index} for part in data.prepare_client(settings, PLAIN, 0, path)[:3]]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 10


def test_prepare_by_a_column(pooled):
    prepared = data.prepare(pooled(split=SPLITS["by"]), PLAIN)
    topics = [{ROWS[i]["topic"] for i in part.index} for part in prepared.train.values()]
    assert sorted(topics, key=min) == [{0}, {1}, {2}]
    split = prepared.report["split"]
    assert (split["column"], sorted(split["values"])) == ("topic", ["0", "1", "2"])
    for client, rows in enumerate(split["rows"]):
        assert rows == [
            len(prepared.train[client]) if split["values"][i] == str(*topics[client]) else 0 for i in range(3)
        ]
    assert split["tokens"] == [len(part.tokens) for part in prepared.train.values()]
    assert split["target_tokens"] == [part.target_tokens for part in prepared.train.values()]
    assert json.loads(json.dumps(split)) == split
    assert "split" not in data.prepare(pooled(), PLAIN).report
    held = [data.prepare(pooled(split=split), PLAIN) for split in SPLITS.values() if split.get("column") != "who"]
    assert all(np.array_equal(each.test.index, held[0].test.index) for each in held), (
        "the clients change no held-out row"
    )


def test_a_value_may_have_held_out_rows_only(pooled):
    rows = [row | {"part": "dev" if row["topic"] == 2 else "train"} for row in ROWS]
    section = {"split_column": "part", "validation": "dev", "test": "final"}
    rows[0]["part"] = "final"
    prepared = data.prepare(pooled(rows, clients=2, split=SPLITS["by"], **section), PLAIN)
    assert sorted(prepared.report["split"]["values"]) == ["0", "1"]
    assert len(prepared.validation) == 10
    with pytest.raises(UserError, match="3 clients but only 2 values"):
        data.prepare(pooled(rows, clients=3, split=SPLITS["by"], **section), PLAIN)


@pytest.mark.parametrize("kind", ["by", "dirichlet"])
def test_another_length_leaves_every_row_with_its_client(pooled, kind):
    rows = [row | {"prompt": "a" * 9 * (i % 7) + "?"} for i, row in enumerate(ROWS)]
    whole, short = (data.prepare(pooled(rows, split=SPLITS[kind], max_length=n), PLAIN) for n in (500, 40))
    assert short.report["train"]["dropped"] > 0
    for client in range(3):
        assert set(short.train[client].index) <= set(whole.train[client].index)
    assert [sum(rows) for rows in short.report["split"]["rows"]] == list(short.report["clients"].values())


def test_the_split_is_the_seeds(pooled):
    def dealt(seed):
        prepared = data.prepare(pooled(split=SPLITS["dirichlet"], validation=0.0, test=0.0, seed=seed), PLAIN)
        return [part.index.tolist() for part in prepared.train.values()]

    assert dealt(0) == dealt(0) != dealt(1)


def test_prepare_by_a_split_column(pooled):
    rows = [row | {"part": ("train", "dev", "final", "other")[i % 4]} for i, row in enumerate(ROWS)]
    prepared = data.prepare(pooled(rows, split_column="part", validation="dev", test="final"), PLAIN)
    assert set(prepared.validation.index % 4) == {1}
    assert set(prepared.test.index % 4) == {2}
    assert prepared.report["left_out"] == 7


def test_prepare_with_a_file_of_its_own(pooled, tmp_path):
    path = write(tmp_path / "held.csv", ROWS[:5])
    settings = pooled(validation=path, test=0.0)
    prepared = data.prepare(settings, PLAIN)
    assert (len(prepared.validation), len(prepared.test)) == (5, 0)
    assert sum(prepared.report["clients"].values()) == 30
    assert prepared.report["validation"]["kept"] == 5
    assert len(data.prepare_held_out_file(settings, PLAIN, "validation")) == 5
    assert data.prepare_held_out_file(settings, PLAIN, "test") is None
    with pytest.raises(UserError, match="data.validation: no.csv: no such file"):
        data.prepare(pooled(validation="no.csv"), PLAIN)


def test_prepare_refuses(pooled):
    with pytest.raises(UserError, match="clients.count: 25 clients but only 24 training rows"):
        data.prepare(pooled(clients=25), PLAIN)
    blank = [row | {"response": ""} for row in ROWS[:29]] + [ROWS[29]]
    with pytest.raises(UserError, match="clients.count: none of the rows of client . has a response"):
        data.prepare(pooled(blank, validation=0.0, test=0.0), PLAIN)


def test_prepare_client_reads_its_own_file_only(tmp_path):
    paths = [write(tmp_path / f"site{i}.jsonl", ROWS[10 * i : 10 * i + 10]) for i in range(3)]
    clients = {"count": 3, "boundary": "site", "split": {"kind": "files", "files": str(tmp_path / "site*.jsonl")}}
    run = {"cache": str(tmp_path / "cache")}
    settings = config(clients=clients, data={"template": "plain"}, run=run)
    assert data.client_files(settings) == [Path(path) for path in paths]
    Path(paths[1]).unlink()
    train, validation, test, report = data.prepare_client(settings, PLAIN, 2, paths[2])
    assert [len(part) for part in (train, validation, test)] == [8, 1, 1]
    assert "number 2" in whole(train, PLAIN)
    assert report["rows"] == 10
    other = data.prepare_client(settings, PLAIN, 0, paths[2])
    assert [part.index.tolist() for part in other[1:3]] != [validation.index.tolist(), test.index.tolist()]
    assert not (tmp_path / "cache").exists()  # a site's rows leave no copy behind
    with pytest.raises(UserError, match=r"^clients.split.files: .*site1.jsonl: no such file"):
        data.prepare_client(settings, PLAIN, 1, paths[1])


def test_client_files_are_counted_and_there(tmp_path):
    paths = [write(tmp_path / f"site{i}.jsonl", ROWS) for i in (2, 10)]

    def files(given, count):
        return data.client_files(config(clients={"count": count, "split": {"kind": "files", "files": given}}))

    assert files(list(reversed(paths)), 2) == [Path(path) for path in reversed(paths)]
    assert files(paths[0], 1) == [Path(paths[0])]
    with pytest.raises(UserError, match="clients.split.files: 2 files for clients.count 3"):
        files(str(tmp_path / "*.jsonl"), 3)
    with pytest.raises(UserError, match="clients.split.files: nowhere.jsonl: no such file"):
        files([paths[0], "nowhere.jsonl"], 2)


# ---- real files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tinystories():
    if not (SHARED / "models/tinystories-656k").is_dir():
        pytest.skip(f"no model in {SHARED} (set GDMPI_SHARED)")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(SHARED / "models/tinystories-656k")


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("counsel_chat_100k", {"split_column": "split", "validation": "val", "test": "test", "group": "qid"}),
        ("mental_health_qa_172", {"group": "topic"}),
        ("sst2_dev", {"columns": {"prompt": "sentence", "response": "label"}, "template": "{prompt} => {response}"}),
        ("tinystories_valid", {}),
    ],
)
def test_shared_data(tinystories, tmp_path, name, section):
    path = SHARED / f"data/{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    settings = config(data={"name": str(path), "max_length": 512} | section, run={"cache": str(tmp_path)})
    prepared = data.prepare(settings, tinystories)
    parts = [*prepared.train.values(), prepared.validation, prepared.test]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(map(len, parts)) + sum(
        prepared.report[key]["dropped"] for key in ("train", "validation", "test")
    ) == len(lines)
    column = prepared.report["columns"].get("response") or prepared.report["columns"]["text"]
    known = set(tinystories.get_vocab())
    for rows in parts:
        for i in range(0, len(rows), 7):
            tokens, target = rows.row(i)
            assert tokens[0] == tinystories.bos_token_id
            assert not target[0]
            if tokens[-1] == tinystories.eos_token_id:
                wanted = "".join(c for c in str(lines[rows.index[i]][column]) if c in known or c == " ")
                learned = tinystories.decode(tokens[target], skip_special_tokens=True)
                # this vocabulary has tokens such as ".\nThe", which straddle
                straddles = tinystories.decode(tokens[target][:1]).strip()
                extra = learned.replace(" ", "").removesuffix(wanted.replace(" ", ""))
                assert straddles.startswith(extra)
                assert len(extra) < 4


def test_the_demo_reads():
    if not data.DEMO.is_file():
        pytest.skip("the demo's data are not built yet")
    table = data.read("demo", config(), None)
    assert data.columns(config(), table, "demo") == {"prompt": "prompt", "response": "response"}
    assert partition.SPLIT not in table.column_names
