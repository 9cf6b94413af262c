"""Public rows: a fraction of a table's rows or a file's, which everybody sees and nobody trains or is scored on."""

import pytest
from conftest import tiny_rows, write_rows
from test_equivalence import alone, configured
from test_kd import COLOURS, LABELS, TEXTS, refused

from gdmpi import build, data, model


@pytest.mark.parametrize("words", [COLOURS, TEXTS])
def test_public_rows_are_nobody_elses_and_groups_stay_whole(tiny, words):
    config = configured(tiny, *words, "data.group=group")
    tokenizer = model.tokenizer(config.model.name)
    prepared = data.prepare(config, tokenizer)
    parts = [*prepared.train.values(), prepared.validation, prepared.test, prepared.public]
    numbers = [set(part.index.tolist()) for part in parts]
    assert set.union(*numbers) == set(range(60)) and sum(map(len, numbers)) == 60
    assert len(numbers[-1]) == pytest.approx(float(words[3].partition("=")[2]) * 48, abs=3)
    groups = [{number // 3 for number in part} for part in (set.union(*numbers[:3]), *numbers[3:])]
    assert sum(map(len, groups)) == 20
    # held-out rows are those of a run without public rows
    without = config.model_copy(update={"data": config.data.model_copy(update={"public": 0.0})})
    plain = data.prepare(without, tokenizer)
    assert plain.public is None
    assert [part.index.tolist() for part in (plain.validation, plain.test)] == [sorted(part) for part in numbers[3:5]]


def test_rows_of_a_file_may_be_public_whatever_their_responses_say(tiny, tmp_path):
    rows = [row | {"topic": "?"} for row in tiny_rows(90)[60:]]
    path = write_rows(tmp_path / "public.jsonl", rows)
    config = configured(tiny, *COLOURS, f"data.public={path}")
    parts = build.build(alone(), config)
    assert len(parts.public) == 30 * 4 and sum(map(len, parts.rows.values())) == 48
    tokenizer = model.tokenizer(config.model.name)
    said = [tokenizer.decode(parts.public.row(i)[0]) for i in range(4)]
    assert said == [f"{rows[0]['prompt']}\n{label}<eos>" for label in LABELS]


def test_held_out_rows_in_the_public_file_are_refused(tiny, tmp_path):
    rows = tiny_rows(120)
    prepared = data.prepare(configured(tiny), model.tokenizer(str(tiny / "model")))
    own = rows[60:] + [rows[prepared.test.index[0]]]
    path = write_rows(tmp_path / "public.jsonl", own)
    says = refused(tiny, *TEXTS, f"data.public={path}")
    assert says == f"data.public: {path}: row 61 is a test row, too: public rows must not be held out; take it out"
    # of labels the prompt counts, whatever the file says of it
    changed = write_rows(tmp_path / "changed.jsonl", [*own[:-1], own[-1] | {"topic": "?"}])
    assert "row 61 is a test row, too" in refused(tiny, *COLOURS, f"data.public={changed}")
    assert "holds no rows" in refused(tiny, *TEXTS, f"data.public={write_rows(tmp_path / 'none.jsonl', [])}")
