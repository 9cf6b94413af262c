"""Answers to held-out prompts: those of plain transformers, one prompt at a time; the same for any number of ranks."""

import contextlib
import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import first, tiny_rows, tiny_tokenizer, within, write_rows
from hypothesis import given, strategies as st
from synthetic import row, write_run
from tokens import BOS, CHAT, CHATML, PLAIN, byte_level, config

from gdmpi import (
    build,
    check,
    checkpoint,
    compare,
    config as configuration,
    data,
    encode,
    events,
    export,
    generate,
    log,
    mpi,
    points,
    report,
    run,
)
from gdmpi.errors import UserError

datasets = pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")
NEW = 12
WORDS = ["data.test=0.4", "evaluation.generate=20", f"evaluation.new_tokens={NEW}", "run.rounds=2"]


def alone():
    from mpi4py import MPI

    return mpi.Link(MPI.COMM_SELF)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last(directory):
    return checkpoint.newest(directory, pytest.fail)[1].metrics[-1]


@pytest.fixture(scope="module")
def words(tiny):
    """Settings of a run that learns to answer: the tiny model's weights, ten times as large, and long training."""
    from safetensors.torch import load_file, save_file

    place = tiny / "lively"
    settings = [*WORDS, f"model.name={place}", "train.lr=0.03", "train.epochs=6"]
    if not first():
        return settings
    shutil.copytree(tiny / "model", place)
    weights = load_file(place / "model.safetensors")
    weights = {name: 10 * tensor if tensor.dim() == 2 else tensor for name, tensor in weights.items()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return settings


@pytest.fixture(scope="module")
def done(tiny, words):
    """The directory of a run that generates, and what it said."""
    said = within(["run", tiny / "tiny.yaml", *words, "run.name=generated", "run.keep=9"]).ok().out
    return tiny / "runs" / "generated", said


def plainly(base, prompts, new=NEW):
    """Greedy answers of a model as transformers has it, one prompt at a time, in tokens."""
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = base.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
            )
        found.append([token for token in out[0, len(prompt) :].tolist() if token not in (0, 2)])
    return found


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_transformers_and_peft_one_prompt_at_a_time(tiny, done):
    import peft
    import transformers

    directory, _ = done
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny / "lively")
    wrapped = peft.PeftModel.from_pretrained(base, directory / "adapter").eval()
    found, rows = lines(directory / generate.FILE), tiny_rows(60)
    assert len(found) == 20 and len({line["row"] for line in found}) == 20
    prompts = [tokenizer(rows[line["row"]]["prompt"] + "\n")["input_ids"] for line in found]
    assert len({len(prompt) for prompt in prompts}) > 1  # so that some are padded
    expected = plainly(wrapped, prompts)
    assert [line["answer"] for line in found] == [tokenizer.decode(answer).strip() for answer in expected]
    assert len({line["answer"] for line in found}) > 3
    assert len({len(answer) for answer in expected} - {NEW}) > 1  # they end by themselves, and not all at once
    for line in found:
        assert line["prompt"] == rows[line["row"]]["prompt"] + "\n"
        assert line["reference"] == rows[line["row"]]["response"] and line["group"] is None


def test_scores_are_in_the_round_the_record_and_show(done):
    directory, said = done
    found, test = lines(directory / generate.FILE), last(directory)["test"]
    assert test["generated"] == 20 and test["cut"] == 0 and test["bleu_signature"].startswith("nrefs:1|case:mixed|")
    again = generate.scores([line["answer"] for line in found], [line["reference"] for line in found])
    assert {key: test[key] for key in again} == again and 0 < test["chrf"] < 100
    words = (
        f"BLEU {test['bleu']:.2f}, ROUGE-L {test['rouge_l']:.2f}, chrF {test['chrf']:.2f}: greedy answers of at most"
    )
    assert "answers  to 20 test prompts after the last round, of at most 12 tokens each\n" in said
    assert f"{words} 12 tokens to 20 test prompts; to be read in {directory / generate.FILE}\n" in said
    assert words in report.show(directory) and test["bleu_signature"] in report.show(directory)
    assert report.summary(directory)["test"]["bleu"] == test["bleu"]
    rows = checkpoint.newest(directory, pytest.fail)[1].metrics
    assert all(each["test"] is None and each["eval_generated"] is None for each in rows[:-1])


@pytest.mark.mpi(min_size=3)
def test_three_ranks_give_the_same_texts(tiny, words, done):
    within(["run", tiny / "tiny.yaml", *words, "run.name=generated-3"], 3).ok()
    other = tiny / "runs" / "generated-3"
    assert (other / generate.FILE).read_bytes() == (done[0] / generate.FILE).read_bytes()
    assert last(other)["test"] == last(done[0])["test"]


def test_a_run_that_was_killed_there_comes_to_the_same(tiny, done, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(done[0], copy)
    expected = (copy / generate.FILE).read_bytes()
    (copy / "round-000002.h5").unlink()
    shutil.rmtree(copy / "adapter")
    (copy / generate.FILE).write_bytes(expected[:50])
    within(["resume", copy]).ok()
    assert (copy / generate.FILE).read_bytes() == expected and last(copy)["test"] == last(done[0])["test"]
    # and one that was killed after it is only brought to its end
    shutil.rmtree(copy / "adapter")
    assert "BLEU" in within(["resume", copy]).ok().out
    assert (copy / generate.FILE).read_bytes() == expected
    # one that goes back, and asks for nothing, has nothing
    within(["resume", copy / "round-000001.h5", "evaluation.generate=0"]).ok()
    assert not (copy / generate.FILE).exists() and "bleu" not in last(copy)["test"]


def test_eval_gives_the_runs_scores_and_texts(tiny, done, tmp_path):
    directory, _ = done
    test = last(directory)["test"]
    texts = tmp_path / "texts.jsonl"
    for source, path in ((directory, None), (directory / "adapter", str(directory / "config.yaml"))):
        said = "\n".join(export.evaluate(alone(), str(source), path, [], str(texts)))
        assert f"BLEU {test['bleu']:.2f}, ROUGE-L {test['rouge_l']:.2f}" in said and test["bleu_signature"] in said
        assert texts.read_bytes() == (directory / generate.FILE).read_bytes()
    untrained = export.score(alone(), str(tiny / "lively"), str(directory / "config.yaml"), ["evaluation.generate=5"])
    assert untrained[2]["test"][3]["generated"] == 5 and untrained[2]["validation"][3] is None
    with pytest.raises(UserError, match="--texts a/b/x.jsonl: there is no directory .*/a/b$"):
        export.evaluate(alone(), str(directory), None, [], "a/b/x.jsonl")
    with pytest.raises(UserError, match="--texts x.jsonl: nothing is generated; give evaluation.generate"):
        export.evaluate(alone(), str(directory), None, ["evaluation.generate=0"], "x.jsonl")


@pytest.mark.mpi(min_size=3)
def test_each_of_several_files_has_its_share_for_any_number_of_ranks(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, paths = tiny_rows(60), [str(tmp_path / f"{n}.jsonl") for n in range(3)]
    for n, path in enumerate(paths if first() else ()):
        write_rows(Path(path), rows[20 * n : 20 * n + 20])
    split = [f"clients.split={{kind: files, files: {json.dumps(paths)}}}", "data.validation=0", *WORDS[:3]]
    for ranks in (1, 3):
        arguments = ["eval", tiny / "model", tiny / "tiny.yaml", *split, "evaluation.generate=11", "--texts"]
        within([*arguments, tmp_path / f"texts-{ranks}"], ranks).ok()
    found = lines(tmp_path / "texts-1")
    assert [line["group"] for line in found] == ["client 0"] * 4 + ["client 1"] * 4 + ["client 2"] * 3
    assert all(line["reference"] == rows[20 * int(line["group"][-1]) + line["row"]]["response"] for line in found)
    assert (tmp_path / "texts-3").read_bytes() == (tmp_path / "texts-1").read_bytes()


@pytest.mark.parametrize("word", ["model.quantize=nf4", "model.adapter.kind=full", "train.dtype=bfloat16"])
def test_other_kinds_of_models_generate_too(tiny, word):
    name = word.replace("=", "-")
    said = [
        "data.test=0",
        "data.validation=0.2",
        *WORDS[2:3],
        "evaluation.generate=3",
        "run.rounds=0",
        f"run.name={name}",
    ]
    run.play(alone(), configuration.load(tiny / "tiny.yaml", [*said, word]), log.Log(False))
    made = last(tiny / "runs" / name)
    assert made["eval_generated"]["generated"] == 3 and made["test"] is None
    assert "to 3 validation prompts\n" in report.show(tiny / "runs" / name)


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 of 64 learnt positions: one more is an error."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("gpt2")
    count = len(tiny_tokenizer(directory, [each["prompt"] + each["response"] for each in tiny_rows(60)]))
    torch.manual_seed(0)
    sizes = {"vocab_size": count, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def built(tiny, gpt2):
    """{name: build.Parts} of models with an adapter that is not zero."""
    import torch

    made = {}
    for name, place in (("llama", tiny / "model"), ("gpt2", gpt2)):
        words = [*WORDS, f"model.name={place}", f"run.name={name}", "clients.count=1"]
        made[name] = build.build(alone(), configuration.load(tiny / "tiny.yaml", words))
        made[name].trainable.vector += 0.1 * torch.randn(
            made[name].trainable.vector.shape, generator=torch.Generator().manual_seed(0)
        )
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_is_that_of_single_prompts(built, name):
    """Left padding, positions and the attention that stands in for transformers' own; as long as the model allows."""
    import peft
    import transformers

    trainable = built[name].trainable
    assert trainable.forward.packed  # so that its attention is ours
    place = built[name].config.model.name
    base = transformers.AutoModelForCausalLM.from_pretrained(place)
    plain = peft.get_peft_model(base, trainable.model.peft_config["default"]).eval()
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(trainable.model))
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 290, length).tolist() for length in (1, 44, 7, 30, 7)]
    found = generate.greedy(trainable, prompts, [2], 20)
    assert [[token for token in each.tolist() if token] for each in found] == plainly(plain, prompts, 20)


def test_what_a_model_says_of_generation_does_not_count(built):
    from transformers import GenerationConfig

    trainable = built["llama"].trainable
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    expected = [each.tolist() for each in generate.greedy(trainable, prompts, [2], 10)]
    own = GenerationConfig(
        do_sample=True,
        temperature=50.0,
        repetition_penalty=9.0,
        num_beams=3,
        max_length=6,
        suppress_tokens=[expected[0][0]],
        eos_token_id=[expected[1][3]],
        min_new_tokens=10,
    )
    before, trainable.forward.base.generation_config = trainable.forward.base.generation_config, own
    try:
        assert [each.tolist() for each in generate.greedy(trainable, prompts, [2], 10)] == expected
        assert trainable.forward.base.generation_config is own
        stop = expected[0][4]
        cut = [each.tolist() for each in generate.greedy(trainable, prompts, [2, stop], 10)]
    finally:
        trainable.forward.base.generation_config = before
    assert cut == [each[: each.index(stop)] if stop in each else each for each in expected] != expected


def test_compiled_layers_are_not_used(built, monkeypatch):
    trainable = built["llama"].trainable
    expected = generate.greedy(trainable, [[5, 6, 7]], [2], 5)[0].tolist()
    monkeypatch.setattr(trainable.forward.base.base_model, "_compiled_call_impl", pytest.fail)
    assert generate.greedy(trainable, [[5, 6, 7]], [2], 5)[0].tolist() == expected
    assert trainable.forward.base.base_model._compiled_call_impl is pytest.fail


def test_it_computes_in_what_training_computes_in(tiny):
    import torch

    words = [*WORDS, "run.name=half", "clients.count=1", "train.dtype=bfloat16"]
    trainable = build.build(alone(), configuration.load(tiny / "tiny.yaml", words)).trainable
    seen = set()
    layer = next(module for module in trainable.model.modules() if hasattr(module, "lora_A"))
    with contextlib.closing(_hook(layer, seen)):
        generate.greedy(trainable, [[5, 6], [7]], [2], 3)
    assert seen == {torch.bfloat16}


def _hook(layer, seen):
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    handle.close = handle.remove
    return handle


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_that_leave_no_room_lose_their_beginning(built, name):
    parts, context = built[name], {"llama": 128, "gpt2": 64}[name]
    ((_, rows, _),) = parts.held_out["test"]
    room = min(len(generate._prompt(rows, i)) for i in range(20))
    found = generate.answers(parts.trainable, rows, [0, 1], [2], context - room)
    assert [len(found[0]), len(found[1])] == [16, 4]
    for i, each in enumerate(found[0] + found[1]):
        whole = generate._prompt(rows, i).tolist()
        assert each["cut"] == (len(whole) > room) and each["prompt"] == whole[-room:]
    assert 0 < sum(each["cut"] for each in found[0] + found[1]) < 20
    changed = parts.config.evaluation.model_copy(update={"new_tokens": context})
    wrong = build.Parts(parts.config.model_copy(update={"evaluation": changed}), [], parts.trainable)
    with pytest.raises(UserError, match=f"evaluation.new_tokens: {context} leave no room for a prompt in the model's"):
        generate.fits(alone(), wrong)


def test_batches_are_the_same_by_themselves(built):
    ((_, rows, _),) = built["llama"].held_out["test"]
    trainable = built["llama"].trainable
    both = generate.answers(trainable, rows, [0, 1], [2], NEW)
    assert generate.answers(trainable, rows, [1], [2], NEW)[1] == both[1]
    assert [each["row"] for each in both[0] + both[1]] == rows.index[:20].tolist()


@given(lengths=st.dictionaries(st.integers(0, 99), st.integers(1, 9000), max_size=16), new=st.integers(1, 5000))
def test_passes_have_each_prompt_once_and_fit(lengths, new):
    groups = generate._passes(lengths, new)
    assert sorted(i for group in groups for i in group) == sorted(lengths)
    for group in groups:
        assert len(group) == 1 or len(group) * (max(lengths[i] for i in group) + new) <= generate.TOKENS
    for before, after in zip(groups, groups[1:], strict=False):
        assert (len(before) + 1) * (lengths[after[0]] + new) > generate.TOKENS


@pytest.mark.parametrize(
    ("tokenizer", "template", "expected"),
    [
        (PLAIN, "plain", ["</s>"]),
        (BOS, "auto", ["</s>"]),
        (CHAT, "auto", ["</s>", "<|im_end|>"]),
        (CHAT, "alpaca", ["</s>"]),
        (byte_level(CHATML.replace("<|im_end|>", "")), "chat", ["</s>"]),  # a line break ends nothing
        (byte_level(CHATML.replace("<|im_end|>", "</s>")), "chat", ["</s>"]),
    ],
)
def test_what_ends_an_answer(tokenizer, template, expected):
    found = generate.ends(config(data={"template": template}), tokenizer)
    assert sorted(tokenizer.convert_ids_to_tokens(found)) == sorted(expected)


# ---- texts ----------------------------------------------------------------------------------------------------------


def referenced(rows, count=50, tokenizer=PLAIN, client=None, **sections):
    """(Rows, references) of a table whose rows are test rows."""
    table = datasets.Dataset.from_list(rows)
    settings = config(evaluation={"generate": count}, **sections)
    roles = data.columns(settings, table, "t")
    held, _ = encode.encode(table, roles, tokenizer, encode.resolve_template(settings, tokenizer)[0], 100)
    held.references = generate.references(settings, "test", table, roles, held, "t", client)
    return held, generate._references(held)


def test_references_are_the_texts_of_first_responses():
    ask, answer = {"role": "user", "content": "q?"}, {"role": "assistant", "content": " one\n"}
    second = {"role": "assistant", "content": "two"}
    talks = [[ask, answer, ask, second], [second, ask, answer], [ask, second | {"content": " "}, ask, second]]
    held, found = referenced([{"messages": talk} for talk in talks], tokenizer=CHAT)
    assert found == ["one", "one", "two"]
    for i, text in enumerate(found):
        tokens, _ = held.row(i)
        begin = len(generate._prompt(held, i))
        assert CHAT.decode(tokens[begin:]).strip().startswith(text)
        assert CHAT.decode(tokens[:begin]).endswith("<|im_start|>assistant\n")
    rows = [{"instruction": "i", "input": "x", "output": f"é☃ {n}" * 60} for n in range(4)]
    assert referenced(rows, 3)[1] == [f"é☃ {n}" * 60 for n in range(3)]  # not cut, and only as many as asked for
    assert referenced([{"prompt": "q", "response": n % 2} for n in range(4)])[1] == list("0101")
    back = data.Rows.from_arrays(held.arrays())
    assert generate._references(back) == found


def test_clients_share_the_prompts():
    rows = [{"prompt": f"{n}", "response": "r"} for n in range(9)]
    clients = {"count": 3, "split": {"kind": "files", "files": ["a", "b", "c"]}}
    assert [len(referenced(rows, 8, client=c, clients=clients)[1]) for c in range(3)] == [3, 3, 2]
    assert [len(referenced(rows, 2, client=c, clients=clients)[1]) for c in range(3)] == [1, 1, 0]


def test_only_the_rows_in_question_have_references():
    rows = [{"prompt": "q", "response": "r"}]
    table = datasets.Dataset.from_list(rows)
    roles = {"prompt": "prompt", "response": "response"}
    for test, generates, expected in ((0.1, 5, "test"), (0.0, 5, "validation"), (0.1, 0, None)):
        settings = config(data={"test": test, "validation": 0.1}, evaluation={"generate": generates})
        held, _ = encode.encode(table, roles, PLAIN, "plain", 100)
        found = {k: generate.references(settings, k, table, roles, held, "t") for k in ("validation", "test")}
        assert [key for key, value in found.items() if value is not None] == [expected] * (generates > 0)


def test_text_alone_has_no_prompts():
    with pytest.raises(
        UserError, match="^evaluation.generate: t: has text alone, and no prompts to answer; leave it 0"
    ):
        referenced([{"text": "once upon a time"}])


def test_texts_of_tokens():
    ids = {text: PLAIN(text)["input_ids"] for text in ("<s>It is?", " It is 3.\n### </s>", "</s>")}
    base = {"row": 4, "group": "a", "cut": False, "reference": "ref"}
    found = [base | {"prompt": ids["<s>It is?"], "answer": ids[text]} for text in (" It is 3.\n### </s>", "</s>")]
    first, second = generate.read(found, PLAIN, "{prompt} {response}\n###")
    assert first == {"prompt": "<s>It is?", "answer": "It is 3.", "reference": "ref", "row": 4, "group": "a"}
    assert second["answer"] == ""
    assert generate.read(found, PLAIN, "plain")[0]["answer"] == "It is 3.\n###"


def test_batches_come_back_in_order():
    parts = [{"10/0": [5], "2/1": [4]}, {"2/0": [2, 3], "0/0": [1]}]
    assert generate._in_order(parts) == [1, 2, 3, 4, 5]
    assert generate._in_order([{"pool/10": [3]}, {}, {"pool/9": [2], "pool/0": [1]}]) == [1, 2, 3]


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_their_formulas():
    """A prefix has all n-grams right: BLEU is its brevity penalty (Papineni et al. 2002), ROUGE-L 2PR / (P + R)."""
    whole = "one two three four five six seven eight nine ten"
    eight = "one two three four five six seven eight"
    found = generate.scores([eight], [whole])
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 10 / 8))
    assert found["rouge_l"] == pytest.approx(100 * 2 * 0.8 / 1.8)
    both = generate.scores([eight, ""], [whole, "two words"])  # an empty answer counts
    assert both["bleu"] == pytest.approx(100 * math.exp(1 - 12 / 8)) and both["generated"] == 2
    assert both["rouge_l"] == pytest.approx(found["rouge_l"] / 2) and both["chrf"] < found["chrf"]
    same = generate.scores([whole, whole], [whole, whole])
    assert [same[key] for key in ("bleu", "rouge_l", "chrf")] == pytest.approx([100] * 3)


@pytest.mark.parametrize(("answer", "reference"), [("", "a word"), ("a word", ""), ("", "")])
def test_nothing_said_scores_nothing(answer, reference):
    found = generate.scores([answer], [reference])
    assert [found[key] for key in ("bleu", "rouge_l", "chrf", "generated")] == [0, 0, 0, 1]


def test_no_answers_have_no_scores():
    assert generate.scores([], []) == {"generated": 0}


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", [["sacrebleu"], ["rouge_score"], ["sacrebleu", "rouge_score"]])
def test_a_missing_package_is_said_at_the_start(tiny, monkeypatch, lacks):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in lacks else find(name, *a))
    settings = configuration.load(tiny / "tiny.yaml", [*WORDS, "run.name=lacking"])
    monkeypatch.setattr(build, "build", pytest.fail)
    verb = "are" if len(lacks) > 1 else "is"
    names = " and ".join(name.replace("_", "-") for name in lacks)
    with pytest.raises(
        UserError, match=f"^evaluation.generate: {names} {verb} not installed; pip install 'gdmpi.text."
    ):
        run.play(alone(), settings, log.Log(False))
    assert not settings.directory.exists()
    generate.check(configuration.load(tiny / "tiny.yaml"))  # nobody asks


def test_clients_with_adapters_of_their_own_are_refused(tiny):
    settings = configuration.load(tiny / "tiny.yaml", [*WORDS, "method.name=local"])
    with pytest.raises(UserError, match="with method.name local each client has its own adapter; leave it 0, and"):
        run.play(alone(), settings, log.Log(False))
    assert not settings.directory.exists()


def test_check_says_what_will_be_generated(tiny):
    said = check.report(configuration.load(tiny / "tiny.yaml", WORDS))
    assert "  answers  to 20 test prompts after the last round, of at most 12 tokens each" in said
    said = check.report(configuration.load(tiny / "tiny.yaml", [*WORDS, "data.test=0"]))
    assert any("to 20 validation prompts (there are no test rows) after" in line for line in said)
    assert not any("answers" in line for line in check.report(configuration.load(tiny / "tiny.yaml")))
    with pytest.raises(UserError, match="each client has its own adapter"):
        check.report(configuration.load(tiny / "tiny.yaml", [*WORDS, "method.name=local"]))


def test_no_rows_are_said_at_the_start(tiny, built):
    parts = built["llama"]
    with pytest.raises(UserError, match="evaluation.generate: there are no test rows, so no prompts to answer"):
        generate.fits(alone(), build.Parts(parts.config, [], parts.trainable))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluation.generate=-1"], "evaluation.generate: "),
        (["evaluation.new_tokens=0"], "evaluation.new_tokens: "),
        (["evaluation.generate=5", "data.test=0", "data.validation=0"], "evaluation.generate: data.validation and"),
        (
            ["evaluation.generate=5", "clients={count: 1, boundary: site, split: {kind: files, files: a}}"],
            "evaluation.generate: answers would leave the sites, which clients.boundary: site forbids",
        ),
    ],
)
def test_wrong_settings_are_refused(words, says):
    with pytest.raises(UserError, match="the command line: ") as caught:
        configuration.load(overrides=words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# ---- beside each other ----------------------------------------------------------------------------------------------


def wrote(directory, bleu, *words, part="test", **others):
    """A run with a score."""
    scores = {"bleu": bleu, "rouge_l": 20.0, "chrf": 30.0, "generated": 5, "cut": 0} | others
    scores |= {"bleu_signature": "nrefs:1", "chrf_signature": "nrefs:1"}
    made = row(1, 2.0, test=1.5)
    made["test"] |= scores if part == "test" else {}
    made["eval_generated"] = scores if part == "validation" else None
    return write_run(directory, [row(0, 3.0), made], "evaluation.generate=5", *words)


def test_runs_beside_each_other(tmp_path):
    a, b = wrote(tmp_path / "a", 12.345), wrote(tmp_path / "b", 15.5, "train.lr=0.5")
    c = write_run(tmp_path / "c", [row(0, 3.0), row(1, 2.0, test=1.5)], "train.lr=0.25")
    text, _ = compare.show([a, b, c])
    assert "test BLEU  test ROUGE-L  test chrF" in text and "val BLEU" not in text
    assert "12.35 " in text and "15.50*" in text and "20.00" in text
    assert "BLEU 12.35, ROUGE-L 20.00, chrF 30.00: greedy answers of at most 128 tokens to 5 test prompts" in text
    told = json.loads(compare.show([a, b, c], "json")[0])
    assert [line["test_bleu"] for line in told["lines"]] == [12.345, 15.5, None]
    assert told["best"]["test_bleu"] == [1] and not told["warnings"]
    assert "BLEU" not in compare.show([c, c])[0]
    validated = wrote(tmp_path / "v", 8.0, part="validation")
    assert "val BLEU" in compare.show([validated, c])[0]
    assert points.point(report.read(validated))["eval_bleu"] == 8
    assert events.scalars(report.read(a).rows[-1])["bleu/test"] == 12.345


def test_other_prompts_cannot_be_compared(tmp_path):
    a, b = wrote(tmp_path / "a", 12.0), wrote(tmp_path / "b", 15.0, "evaluation.new_tokens=9")
    told = json.loads(compare.show([a, b], "json")[0])
    assert "test_bleu" not in told["best"]
    (warning,) = told["warnings"]
    assert "other prompts or answers" in warning and "test BLEU, test ROUGE-L, test chrF cannot be compared" in warning


def test_texts_can_be_compared_across_tokenizers(tmp_path):
    from synthetic import about

    known = about()
    known["data"]["test"] = known["data"]["test"] | {"target_tokens": 999}
    a, b = wrote(tmp_path / "a", 12.0), tmp_path / "b"
    scores = {"bleu": 15.0, "rouge_l": 20.0, "chrf": 30.0, "generated": 5, "cut": 0, "bleu_signature": "x"}
    made = row(1, 1.0, test=0.5)
    made["test"] |= scores
    write_run(b, [row(0, 3.0), made], "evaluation.generate=5", known=known)
    told = json.loads(compare.show([a, b], "json")[0])
    assert told["best"]["test_bleu"] == [1] and "test_loss" not in told["best"]
