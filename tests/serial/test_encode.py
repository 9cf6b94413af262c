"""From rows to tokens: columns, templates, and which tokens carry loss."""

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from tokens import BOS, CHAT, CHATML, PLAIN, ROWS, byte_level, config, encoded, whole

from gdmpi import data, encode
from gdmpi.config import UserError

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")


# ---- columns and templates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "named", "roles"),
    [
        ("prompt response topic", {}, {"prompt": "prompt", "response": "response"}),
        ("question answer", {}, {"prompt": "question", "response": "answer"}),
        ("instruction output", {}, {"instruction": "instruction", "output": "output"}),
        ("output input instruction", {}, {"instruction": "instruction", "input": "input", "output": "output"}),
        ("conversations id", {}, {"messages": "conversations"}),
        ("text", {}, {"text": "text"}),
        ("prompt response sentence", {"text": "sentence"}, {"text": "sentence"}),
        ("sentence response", {"prompt": "sentence"}, {"prompt": "sentence", "response": "response"}),
    ],
)
def test_columns(there, named, roles):
    table = datasets.Dataset.from_dict({column: ["x"] for column in there.split()})
    found = data.columns(config(data={"columns": named}), table, "rows")
    assert list(found.items()) == list(roles.items())


def test_wrong_columns():
    table = datasets.Dataset.from_dict({"sentence": ["x"], "label": [1]})
    with pytest.raises(UserError, match=r"rows are not recognised \(sentence, label\); .*data.columns.prompt=COLUMN"):
        data.columns(config(), table, "rows")
    with pytest.raises(UserError, match="data.columns.prompt: rows has no column 'text'; it has sentence, label"):
        data.columns(config(data={"columns": {"prompt": "text"}}), table, "rows")


def test_resolve_template():
    def resolve(template, tokenizer):
        return data.resolve_template(config(data={"template": template}), tokenizer)

    assert resolve("auto", CHAT) == ("chat", "the tokenizer has a chat template")
    assert resolve("auto", PLAIN) == ("plain", "the tokenizer has no chat template")
    assert resolve("alpaca", CHAT)[0] == "alpaca"
    assert resolve("Q {prompt} A {response}", PLAIN)[0] == "Q {prompt} A {response}"
    with pytest.raises(UserError, match="data.template: chat, but the tokenizer has no chat template"):
        resolve("chat", PLAIN)
    for wrong in ("Q {prompt} A", "chta", "{response} {prompt}"):
        with pytest.raises(UserError, match="is not auto, chat, alpaca or plain, nor a text with {prompt} and then"):
            resolve(wrong, PLAIN)


def test_templates_write_what_is_known():
    out, _, targets = encoded([{"prompt": "Why?", "response": "So."}])
    assert (whole(out, PLAIN), targets) == ("Why?\nSo.</s>", ["So.</s>"])
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    out, _, targets = encoded([row, row | {"input": ""}], template="alpaca")
    assert whole(out, PLAIN).endswith("request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>")
    assert whole(out, PLAIN, 1).endswith("completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n3</s>")
    assert targets == ["3</s>"] * 2
    assert whole(encoded([row])[0], PLAIN) == "Add.\n1 2\n3</s>"
    assert whole(encoded([row], CHAT, "chat")[0], CHAT).startswith("<|im_start|>user\nAdd.\n1 2<|im_end|>\n")
    out, _, targets = encoded([{"prompt": "{response}", "response": "{prompt}"}], template="<{prompt}|{response}>")
    assert (whole(out, PLAIN), targets) == ("<{response}|{prompt}></s>", ["{prompt}></s>"])


# ---- what carries loss ---------------------------------------------------------------------------------------------

# no surrogates (no such text exists in UTF-8), and nothing that is a special token by accident
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "</s" not in text)


@given(prompt=ANY_TEXT, response=ANY_TEXT.filter(str.strip), bos=st.booleans())
@settings(max_examples=150, deadline=None)
def test_targets_are_the_response(prompt, response, bos):
    tokenizer = BOS if bos else PLAIN
    text, spans = encode.render(
        [("user", prompt), ("assistant", response)], "{prompt}<|im_start|>{response}", tokenizer, "row"
    )
    ((tokens, target, _),) = encode._tokenise([(text, spans)], tokenizer, {"verbose": False}, {})
    assert tokenizer.decode(tokens[target]) == f"{response}</s>"
    assert tokenizer.decode(tokens[~target]) == f"{'<s>' if bos else ''}{prompt}<|im_start|>"


@given(st.lists(ANY_TEXT.filter(lambda text: text.strip() and "<|" not in text), min_size=2, max_size=6))
@example(["Is 1 > 0?", ">", "And 0?", "|>"])  # what the end-of-turn marker ends with
@settings(max_examples=60, deadline=None)
def test_targets_are_every_assistant_turn(said):
    row = {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}
    out, _, targets = encoded([row], CHAT, "chat")
    assert targets == ["".join(f"{text}<|im_end|>" for text in said[1::2])]
    assert whole(out, CHAT) == CHAT.apply_chat_template(row["messages"], tokenize=False)
    _, _, targets = encoded([row], PLAIN)
    assert "".join(f"{text}</s>" for text in said[1::2]).endswith(targets[0][-20:])


def test_conversations_in_both_spellings():
    said = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye")]
    sharegpt = {"conversations": [{"from": role, "value": text} for role, text in said]}
    out, _, targets = encoded([sharegpt], CHAT, "chat")
    assert targets == ["Hello<|im_end|>"]
    assert whole(out, CHAT).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    out, _, targets = encoded([sharegpt])
    assert (whole(out, PLAIN), targets) == ("Be kind.\nHi\nHello</s>", ["Hello</s>"])
    greeting = {"conversations": [{"from": "gpt", "value": "Welcome"}, *sharegpt["conversations"][1:]]}
    assert encoded([greeting], CHAT, "chat")[2] == ["Hello<|im_end|>"]


def test_a_token_that_straddles_prompt_and_response_is_a_target():
    row = {"prompt": "is", "response": "years"}
    out, _, targets = encoded([row], template="{prompt} {response}")
    assert " years" in [PLAIN.decode([token]) for token in out.row(0)[0]]
    assert targets == [" years</s>"]


def test_trimmed_offsets():
    row = {"prompt": "a ", "response": "  b  c "}
    assert encoded([row], byte_level(trim_offsets=True), "{prompt}<|im_start|>{response}")[2] == ["  b  c </s>"]


def test_texts_are_targets_but_for_the_first_token():
    for tokenizer in (PLAIN, CHAT):
        out, _, targets = encoded([{"text": "number years"}], tokenizer, "chat" if tokenizer is CHAT else "plain")
        first = tokenizer.decode(out.row(0)[0][:1])
        assert first + targets[0] == whole(out, tokenizer) == "number years</s>"
        assert out.row(0)[1].tolist() == [False] + [True] * (len(out.tokens) - 1)
    assert encoded([{"text": "number years"}], BOS)[2] == ["number years</s>"]


def test_bos_and_eos_are_never_doubled():
    both, row = byte_level("<s>" + CHATML, bos=True, eos=True), {"prompt": "a", "response": "b"}
    for template, text in [
        ("plain", "<s>a\nb</s>"),
        ("<s>[{prompt}]\n{response}</s>", "<s>[a]\nb</s>"),
        ("chat", "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"),
    ]:
        out, _, targets = encoded([row], both, template)
        assert whole(out, both) == text
        assert targets == ["b<|im_end|>" if template == "chat" else "b</s>"]
    out, _, targets = encoded([{"text": "<s>a"}], both)
    assert (whole(out, both), targets) == ("<s>a</s>", ["a</s>"])


def test_lost_characters_do_not_shift_the_targets():
    """A vocabulary without bytes and without an unknown token: tokenizers then report offsets that are too small."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(["</s>", "▁", "\n", "a", "b", "c"])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    out, _, _ = encoded([{"prompt": "aé☃a#", "response": "bé b"}], tokenizer)
    tokens, target = out.row(0)
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == ["▁", "a", "a", "\n", "b", "▁", "b", "</s>"]
    assert target.tolist() == [False] * 4 + [True] * 4


def without_merges(extra, normalizer, pre_tokenizer):
    """A tokenizer with a token for each of a few characters and those in extra; all others are lost."""
    from transformers import PreTrainedTokenizerFast

    symbols = ["</s>", "<|x|>", "▁", "\n", "a", "b", *extra]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    bpe.normalizer, bpe.pre_tokenizer = normalizer, pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", additional_special_tokens=["<|x|>"])


SPACES = {  # how tokenizers write the space before a text
    "first": (None, tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "never": (None, tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    "doubled": (
        tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        ),
        None,
    ),
}
LOSSY = {name: (without_merges("", *how), without_merges("`é", *how)) for name, how in SPACES.items()}
FEW = st.text("ab `é", max_size=6)


@pytest.mark.parametrize("spaces", SPACES)
@given(
    prompt=FEW,
    response=FEW.filter(str.strip),
    template=st.sampled_from(["{prompt}\n{response}", "{prompt}<|x|>{response}"]),
)
@example("`` a", "b", "{prompt}\n{response}")
@example("` a", "` b", "{prompt}<|x|>{response}")
@settings(max_examples=100, deadline=None)
def test_targets_are_those_of_a_tokenizer_that_loses_nothing(spaces, prompt, response, template):
    lossy, whole = LOSSY[spaces]
    laid = [encode.render([("user", prompt), ("assistant", response)], template, lossy, "row")]
    ((tokens, target, _),) = encode._tokenise(laid, lossy, {"verbose": False}, {})
    ((all_tokens, expected, _),) = encode._tokenise(laid, whole, {"verbose": False}, {})
    kept = all_tokens < len(lossy)
    assert tokens.tolist() == all_tokens[kept].tolist()
    assert target.tolist() == expected[kept].tolist()


def test_rows_are_cut_and_dropped():
    rows = [
        {"prompt": "a", "response": "number " * 40},
        {"prompt": "number " * 40, "response": "a"},
        {"prompt": "a", "response": None},
        {"prompt": "a", "response": " "},
        {"prompt": None, "response": "b"},
    ]
    out, counts, targets = encoded(rows, max_length=10)
    assert out.index.tolist() == [0, 4]
    assert np.diff(out.starts).tolist() == [10, 3]
    assert "</s>" not in targets[0]
    expected = {"rows": 5, "kept": 2, "dropped": 3, "truncated": 1, "tokens": 13, "target_tokens": 10}
    assert counts == expected
    assert out.target_tokens == 10
    with pytest.raises(UserError, match="data.name: no row has a response within data.max_length 8 tokens"):
        encoded(rows[1:2], max_length=8)


def test_wrong_rows():
    with pytest.raises(UserError, match="data.name: row 2: holds a list where text is expected"):
        encode.turns({"prompt": ["x"], "response": "y"}, "data.name: row 2")
    assert encode.turns({"prompt": "x", "response": 1}, "") == [("user", "x"), ("assistant", "1")]
    with pytest.raises(UserError, match="messages must be a list of {role, content} or {from, value}"):
        encode.turns({"messages": [{"who": "me"}]}, "row")
    assert encoded([{"messages": None}, {"messages": [{"role": "user", "content": "a"}]}, *[MESSAGES]], CHAT, "chat")[
        1
    ]["dropped"] == (2)


MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}


def test_unusable_tokenizers_and_chat_templates():
    rewrites = "{% for m in messages %}{{ m['content'] }}{{ '|' if loop.last else '&' }}{% endfor %}"
    with pytest.raises(UserError, match="row 1: the tokenizer's chat template is unusable for training"):
        encoded([MESSAGES], byte_level(rewrites), "chat")
    with pytest.raises(UserError, match=r"row 1: the chat template refuses it \(no, never\); use another"):
        encoded([MESSAGES], byte_level("{{ raise_exception('no, never') }}"), "chat")

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="model.name: its tokenizer has no fast version"):
        data.encode(datasets.Dataset.from_list(ROWS), {}, Slow(), "plain", 10)


def test_a_chat_template_whose_marker_is_a_line_break():
    lines = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = byte_level(lines + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert encoded([MESSAGES], tokenizer, "chat")[2] == [" b\n b\n"]
