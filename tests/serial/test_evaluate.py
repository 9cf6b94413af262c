"""What held-out rows come to: losses, hits and bytes row by row, against transformers and the texts themselves."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_rows, within, write_rows
from hypothesis import given, settings, strategies as st
from test_equivalence import alone, configured
from test_forward import MODELS, made, rows_of
from tokens import encoded

from gdmpi import answers, build, evaluate, forward, log, report, run


@pytest.mark.parametrize("name", MODELS)
def test_hits_are_the_targets_that_are_likeliest(name):
    model, rows = made(name), rows_of([9, 20, 5, 13])
    for i in range(len(rows)):  # of each row's second half the tokens are those that the model holds likeliest
        tokens, _ = rows.row(i)
        for place in range(len(tokens) // 2, len(tokens)):
            tokens[place] = (
                model(input_ids=torch.from_numpy(tokens[:place].astype(np.int64))[None]).logits[0, -1].argmax()
            )
    runs = forward.Forward(model, torch.device("cpu"))
    expected = []
    for tokens, target in map(rows.row, range(len(rows))):
        ids = torch.from_numpy(tokens.astype(np.int64))
        best = model(input_ids=ids[None]).logits[0].argmax(-1)
        expected += (best[np.flatnonzero(target) - 1] == ids[np.flatnonzero(target)]).tolist()
    assert 0 < sum(expected) < len(expected)
    assert runs.scores(rows, range(len(rows)))[1].tolist() == expected


@pytest.fixture(scope="module")
def scored(tiny):
    """(lines of the held-out rows, Rows, what losses() gives of them)."""
    parts = build.build(alone(), configured(tiny, "data.validation=0.6", "evaluation.by=topic"))
    lines = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()]
    ((_, rows, wanted),) = parts.held_out["validation"]
    return [lines[number] for number in rows.index], rows, evaluate.losses(parts.trainable, rows, wanted), parts


def test_each_row_has_its_loss_its_tokens_its_bytes_and_its_group(scored):
    lines, rows, found, parts = scored
    flat = [row for number in sorted(found) for row in found[number]]
    assert len(flat) == len(lines) == 36
    for i, (line, (group, loss, tokens, hits, nbytes)) in enumerate(zip(lines, flat, strict=True)):
        own = parts.trainable.forward.losses(rows, [i]).double()
        assert group == line["topic"] and nbytes == len(line["response"].encode())
        assert tokens == len(own) and 0 <= hits <= tokens
        assert math.isclose(loss, float(own.sum()), rel_tol=1e-5)


def test_score_is_the_mean_over_tokens_and_of_each_group(scored):
    lines, _, found, _ = scored
    score = evaluate.total([{f"pool/{number}": rows} for number, rows in found.items()])
    rows = [row for each in found.values() for row in each]
    loss, tokens, hits, nbytes = (sum(row[place] for row in rows) for place in range(1, 5))
    assert score.tokens == tokens and math.isclose(score.loss, loss / tokens, rel_tol=1e-12)
    assert score.accuracy == hits / tokens
    assert nbytes == sum(len(line["response"].encode()) for line in lines)
    assert math.isclose(score.bits_per_byte, loss / nbytes * math.log2(math.e), rel_tol=1e-12)
    assert list(score.groups) == sorted({line["topic"] for line in lines})
    red = [row for row in rows if row[0] == "red"]
    assert math.isclose(score.groups["red"], sum(row[1] for row in red) / sum(row[2] for row in red), rel_tol=1e-12)


def test_order_of_the_ranks_does_not_matter(scored):
    *_, found, _ = scored
    parts = [{f"pool/{number}": rows} for number, rows in found.items()]
    assert (
        evaluate.total(parts) == evaluate.total(parts[::-1]) == evaluate.total([{**parts[1], **parts[0]}, *parts[2:]])
    )


def test_without_rows_there_is_no_number():
    score = evaluate.total([{}, {}])
    assert score.tokens == 0 and all(map(math.isnan, score[:1] + score[2:4])) and score.groups is None


def test_clients_by_themselves_are_averaged():
    one, two = [("a", 6.0, 2, 1, 3), ("b", 0.0, 2, 2, 1)], [("a", 12.0, 3, 0, 4)]
    score = evaluate.total([{"clients": {"0/0/0": one}}, {"clients": {"1/1/0": two}}])  # each its own rows
    assert score.clients == {"0": 1.5, "1": 4.0}
    assert (score.loss, score.tokens, score.accuracy) == (2.75, 7, (3 / 4 + 0) / 2)
    assert math.isclose(score.bits_per_byte, (6 / math.log(2) / 4 + 12 / math.log(2) / 4) / 2)


@pytest.mark.parametrize("pool", ["pool", "file"])
def test_rows_that_all_clients_score_are_counted_once(pool):
    batches = [[[("a", loss, 2, 1, 3)], [("b", loss, 5, 1, 3)]] for loss in (6.0, 12.0, 24.0)]
    parts = [
        {"clients": {f"{client}/{pool}/{number}": batch for number, batch in enumerate(own)}}
        for client, own in enumerate(batches)
    ]
    parts[1]["clients"] |= {"1/1/0": [("c", 6.0, 1, 0, 4)]}
    score = evaluate.total(parts)
    assert score.tokens == 2 + 5 + 1 and score.clients == {"0": 12 / 7, "1": 30 / 8, "2": 48 / 7}
    rights = [{"clients": {f"{client}/{pool}/0": (client, 4)}} for client in range(3)]
    assert answers.share(rights) == (0.25, 4, {"0": 0.0, "1": 0.25, "2": 0.5})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=40)), min_size=1, max_size=4))
def test_bytes_are_those_of_the_responses_whatever_the_tokenizer_does(pairs):
    rows, _, _ = encoded(
        [{"prompt": prompt, "response": response + "x"} for prompt, response in pairs], max_length=4096
    )
    assert rows.nbytes.tolist() == [len((pairs[i][1] + "x").encode()) for i in rows.index]


def test_bytes_of_a_row_that_is_cut_are_those_of_what_is_left():
    found = [encoded([{"prompt": "a", "response": "bcdéfgh" * 30}], max_length=n)[::2] for n in range(10, 120, 7)]
    sizes = [int(rows.nbytes[0]) for rows, _ in found]
    assert sizes == sorted(sizes) and 0 < sizes[0] < sizes[-1] < 8 * 30
    for size, (_, (text,)) in zip(sizes, found, strict=True):
        assert abs(size - len(text.encode())) <= 3  # a character that is cut is counted whole


@pytest.mark.mpi(min_size=3)
def test_topics_and_what_is_known_of_tokens_reach_the_run_and_eval(tiny):
    settings = ["run.rounds=1", "evaluation.by=topic", "data.validation=0.3"]
    here = configured(tiny, *settings)
    directory = here.directory
    within(["run", tiny / "tiny.yaml", f"run.name={directory.name}", *settings], 3).ok()
    shown = report.summary(directory)
    row = shown["rounds"][-1]
    assert set(row["eval_groups"]) <= {"red", "blue", "green", "black"} and len(row["eval_groups"]) > 1
    assert 0 <= row["eval_token_accuracy"] <= 1 and row["eval_bits_per_byte"] > 0
    assert shown["test"]["bits_per_byte"] > 0 and shown["test"]["groups"]
    said = within(["eval", directory]).ok().out
    assert f"bits per byte {row['eval_bits_per_byte']:.4f}" in said
    assert all(f"loss {loss:.6f}  {topic}" in said for topic, loss in row["eval_groups"].items())
    assert "bits a byte of text" in report.show(directory, "text")


def test_a_column_that_is_not_there_is_refused_in_one_line(tiny):
    result = within(["run", tiny / "tiny.yaml", "run.name=by", "evaluation.by=subject"])
    assert result.code == 2
    assert "evaluation.by: " in result.err and "has no column 'subject'" in result.err and result.err.count("\n") == 1


def test_losses_of_files_are_given_by_client(tiny, tmp_path):
    rows = tiny_rows(60)
    for client in range(3):
        write_rows(tmp_path / f"site{client}.jsonl", rows[20 * client : 20 * client + 20])
    files = ["clients.split.kind=files", f"clients.split.files={tmp_path}/site*.jsonl", "data.validation=0.3"]
    here = configured(tiny, "run.rounds=1", *files)
    run.play(alone(), here, log.Log(False))
    groups = report.summary(here.directory)["rounds"][-1]["eval_groups"]
    assert list(groups) == ["client 0", "client 1", "client 2"]
