"""Answer accuracy: every label is tried on every held-out row, and the likeliest is that of a plain loop."""

import json

import numpy as np
import pytest
from conftest import within
from tokens import PLAIN, ROWS, config

from gdmpi import answers, build, checkpoint, compare, config as configuration, data, evaluate, mpi, report

datasets = pytest.importorskip("datasets")
LABELS = ["red", "blue", "green", "black"]
WORDS = ["data.columns={prompt: prompt, response: topic}", f"evaluation.labels=[{','.join(LABELS)}]"]


@pytest.fixture
def prepared(tmp_path):
    def make(rows, labels, **section):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {"name": str(path), "template": "plain", "validation": 0.3} | section
        settings = {"data": section, "evaluation": {"labels": labels}, "run": {"cache": str(tmp_path / "cache")}}
        return data.prepare(config(clients={"count": 1}, **settings), PLAIN)

    return make


def rated(count=30):
    return [{"prompt": ROWS[i]["prompt"], "response": ("good", "bad", "so so")[i % 3]} for i in range(count)]


# ---- candidates -----------------------------------------------------------------------------------------------------


def test_every_label_is_tried_on_every_row_the_true_one_first(prepared):
    rows, labels = rated(), ["so so", "bad", "good"]
    held = prepared(rows, labels).validation
    assert len(held) == 9 and held.answers.index.tolist() == [i for i in range(9) for _ in labels]
    for i, number in enumerate(held.index):
        tried = [PLAIN.decode(held.answers.row(3 * i + j)[0]) for j in range(3)]
        true = rows[number]["response"]
        expected = [true, *(label for label in labels if label != true)]
        assert tried == [f"{rows[number]['prompt']}\n{label}</s>" for label in expected]
        assert all(np.array_equal(a, b) for a, b in zip(held.answers.row(3 * i), held.row(i), strict=True))
        targets = [held.answers.row(3 * i + j) for j in range(3)]
        assert [PLAIN.decode(tokens[target]) for tokens, target in targets] == [f"{label}</s>" for label in expected]


def test_without_labels_there_is_nothing_to_try(prepared):
    assert prepared(rated(), None).validation.answers is None
    whole = prepared(rated(), ["good", "bad", "so so"])
    assert all(rows.answers is None for rows in whole.train.values())
    assert prepared(rated(), ["good", "bad", "so so"], test=0.0).test.answers is None


def test_rows_travel_with_their_candidates(prepared):
    held = prepared(rated(), ["good", "bad", "so so"]).validation
    back = data.Rows.from_arrays(held.arrays())
    assert back.arrays().keys() == held.arrays().keys() and len(held.arrays()) == 10
    assert all(np.array_equal(array, back.arrays()[name]) for name, array in held.arrays().items())


def test_a_number_is_a_label(prepared):
    rows = [row | {"response": i % 2} for i, row in enumerate(rated())]
    held = prepared(rows, [0, "1"]).validation
    assert [PLAIN.decode(held.answers.row(2 * i)[0]) for i in range(9)] == [
        f"{rows[number]['prompt']}\n{number % 2}</s>" for number in held.index
    ]


def test_a_row_that_is_too_long_with_a_label_is_left_out(prepared):
    rows = [row | {"prompt": "qz?"[2 - 2 * (i % 2) :]} for i, row in enumerate(rated())]
    longest = max(len(PLAIN(f"?\n{label}</s>")["input_ids"]) for label in ("good", "bad", "so so"))
    held = prepared(rows, ["good", "bad", "so so"], max_length=longest).validation
    short = [i for i, number in enumerate(held.index) if number % 2 == 0]
    assert data.counts(held)["answered"] == len(short) < len(held)
    assert held.answers.index.tolist() == [i for i in short for _ in range(3)]
    long = [{"prompt": "y" * 20, "response": "so so"} for _ in range(30)]
    fits = len(PLAIN(f"{'y' * 20}\nso so")["input_ids"])  # but not what ends it
    with pytest.raises(configuration.UserError, match="^evaluation.labels: .*no row has room for a label within"):
        prepared(long, ["good", "bad", "so so"], max_length=fits)


def test_files_of_held_out_rows_and_of_clients_have_candidates_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rated()))
    sections = {"data": {"template": "plain", "test": str(path)}, "run": {"cache": str(tmp_path / "cache")}}
    clients = {"count": 1, "boundary": "site", "split": {"kind": "files", "files": str(path)}}
    settings = config(**sections, clients=clients, evaluation={"labels": ["good", "bad", "so so"]})
    held = data.prepare_held_out_file(settings, PLAIN, "test")
    assert len(held) == 30 and len(held.answers) == 90
    train, validation, test, report = data.prepare_client(settings, PLAIN, 0, path)
    assert (train.answers, len(validation.answers), len(test), test.answers) == (None, 9, 0, None)
    assert report["validation"]["answered"] == 3
    wrong = config(**sections, clients=clients, evaluation={"labels": ["good", "bad"]})
    with pytest.raises(configuration.UserError, match=r"row \d+: the response is none of good, bad; correct"):
        data.prepare_client(wrong, PLAIN, 0, path)  # what a site's rows say stays there


@pytest.mark.parametrize(
    ("change", "labels", "match"),
    [
        (
            {},
            ["good", "bad"],
            r"rows.jsonl: validation: row \d+: the response 'so so' is none of good, bad; correct",
        ),
        ({}, ["good", "bad", "so  so"], "the response 'so so' is none of"),
        (
            {"prompt": None, "response": None, "text": "good"},
            ["good", "bad"],
            "has text, and no column that holds resp",
        ),
    ],
)
def test_responses_that_are_no_label_are_refused(prepared, change, labels, match):
    rows = [{key: value for key, value in (row | change).items() if value is not None} for row in rated()]
    with pytest.raises(configuration.UserError, match=f"^evaluation.labels: .*{match}") as caught:
        prepared(rows, labels)
    assert "\n" not in str(caught.value)


def test_labels_that_a_tokenizer_does_not_tell_apart_are_refused():
    """One that knows four words and takes every other for unknown."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<unk>": 0, "</s>": 1, "is": 2, "it": 3, "good": 4}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    table = datasets.Dataset.from_list([{"prompt": "is it", "response": "bad"}])
    settings = config(data={"template": "{prompt} {response} "}, evaluation={"labels": ["bad", "poor", "good"]})
    roles = data.columns(settings, table, "t")
    rows, _ = data.encode(table, roles, tokenizer, settings.data.template, 50)
    with pytest.raises(configuration.UserError, match="t: bad and poor are the same tokens"):
        answers.candidates(settings, table, roles, tokenizer, settings.data.template, rows, "t")


def test_what_tells_labels_apart_counts_where_offsets_are_off(prepared):
    """As after characters that a tokenizer loses: the label's own tokens are then not all known for targets."""
    held = prepared(rated(), ["good", "bad"] + ["so so"]).validation.answers
    shifted = data.Rows(held.tokens, held.target.copy(), held.starts, held.index)
    for i in range(len(held)):
        shifted.row(i)[1][:-1] = False  # but the end's
    said = [label for i in range(len(held)) for label in [PLAIN.decode(held.row(i)[0][held.row(i)[1]])]]
    shifted.index = np.arange(len(held))
    answers._mark(shifted, said, 3, "t")
    assert np.array_equal(shifted.target, held.target)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("evaluation.labels=[one]", "evaluation.labels: list should have at least 2"),
        ("evaluation.labels=[a, b, a]", "evaluation: labels: 'a' is there twice"),
        ("evaluation.labels=[1, '1']", "evaluation: labels: '1' is there twice"),
        ("evaluation.labels=[yes, no]", "evaluation.labels.0: input should be a valid string, not True"),
        ("evaluation.labels=['', a]", "evaluation.labels.0: "),
        (
            "evaluation={labels: [a, b]} data.validation=0 data.test=0",
            "evaluation.labels: data.validation and data.test",
        ),
    ],
)
def test_wrong_labels_are_refused(word, says):
    words = word.split(" data.")
    with pytest.raises(configuration.UserError, match="the command line: ") as caught:
        configuration.load(overrides=[words[0], *(f"data.{each}" for each in words[1:])])
    assert says in str(caught.value) and "\n" not in str(caught.value)


# ---- scores ---------------------------------------------------------------------------------------------------------


def alone():
    from mpi4py import MPI

    return mpi.Link(MPI.COMM_SELF)


@pytest.fixture(scope="module")
def parts(tiny):
    words = ["data.validation=0.6", "data.test=0", "run.name=answers"]
    return build.build(alone(), configuration.load(tiny / "tiny.yaml", [*WORDS, *words]))


def test_the_likeliest_label_is_that_of_a_plain_loop(tiny, parts):
    """Each text by itself, through transformers as it is: the sum over the label's tokens and the end's."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()
    lines = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()]
    ((_, rows, wanted),) = parts.held_out["validation"]

    def likelihood(prompt, label):
        begin, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, prompt + label))
        assert torch.equal(whole[:, : begin.shape[1]], begin)
        with torch.inference_mode():
            found = torch.log_softmax(base(whole).logits[0].double(), -1)
        return float(sum(found[i - 1, whole[0, i]] for i in range(begin.shape[1], whole.shape[1])))

    hits = []
    for number in rows.index:
        prompt = lines[number]["prompt"] + "\n"
        best = max(LABELS, key=lambda label: likelihood(prompt, f"{label}<eos>"))  # noqa: B023
        hits.append(best == lines[number]["topic"])
    assert 0 < sum(hits) < len(hits) == 36
    found = answers.right(parts.trainable, rows, wanted)
    assert found == {n: (sum(hits[i] for i in ids), len(ids)) for n, ids in enumerate(evaluate.plan(rows))}
    assert answers.share([{"0": found[0]}, {"2": found[2]}, {"1": found[1]}]) == (sum(hits) / 36, 36, None)
    apart = [{"clients": {"0/pool/0": (1, 4), "1/pool/0": (1, 2)}}, {"clients": {"0/pool/1": (0, 4)}}]
    assert answers.share(apart) == ((1 / 8 + 1 / 2) / 2, 6, {"0": 1 / 8, "1": 1 / 2})
    assert answers.share([*apart, {"served": {"pool/0": (3, 4)}}]) == (3 / 4, 4, {"0": 1 / 8, "1": 1 / 2})


def test_each_batch_is_the_same_by_itself_and_may_have_nothing_to_answer(parts):
    ((_, rows, wanted),) = parts.held_out["validation"]
    whole = answers.right(parts.trainable, rows, wanted)
    assert {n: answers.right(parts.trainable, rows, [n])[n] for n in reversed(wanted)} == whole
    fewer = rows.take(range(len(rows)))
    fewer.answers = rows.answers.take(range(20 * 4, 30 * 4))
    found = answers.right(parts.trainable, fewer, wanted)
    assert [count for _, count in found.values()] == [0, 10, 0]
    assert found[1][0] <= whole[1][0]


def test_accuracy_is_in_the_rounds_the_record_and_eval(tiny, monkeypatch):
    words = [*WORDS, "run.name=answered", "run.rounds=1", "data.test=0.3"]
    said = within(["run", tiny / "tiny.yaml", *words]).ok().out
    directory = tiny / "runs" / "answered"
    metrics = checkpoint.newest(directory, pytest.fail)[1].metrics
    shares = [row["eval_accuracy"] for row in metrics]
    assert all(share * 6 == pytest.approx(round(share * 6)) for share in shares)
    assert "accuracy over 6 validation and 18 test rows\n" in said
    assert f"accuracy {shares[0]:.1%}\n" in said and f"accuracy {shares[1]:.1%}  up" in said
    test = metrics[-1]["test"]
    assert test["answered"] == 18 and f"test accuracy {test['accuracy']:.1%}: the likeliest label of 18 rows" in said
    summary = report.summary(directory)
    assert [row["eval_accuracy"] for row in summary["rounds"]] == shares
    assert summary["test"]["accuracy"] == test["accuracy"]
    shown = report.show(directory)
    assert "val acc" in shown and f"test accuracy {test['accuracy']:.1%} of 18 rows" in shown
    assert "test acc" in compare.show([directory] * 2)[0]
    header, *rows = (directory / "metrics.csv").read_text().splitlines()
    assert [float(row.split(",")[header.split(",").index("eval_accuracy")]) for row in rows] == shares
    monkeypatch.chdir(tiny)
    evaluated = within(["eval", directory]).ok().out
    assert f"accuracy {shares[1]:.2%}" in evaluated and f"accuracy {test['accuracy']:.2%}" in evaluated
