"""Encode: lay a row out by a template, tokenise it, and mark the tokens that carry loss.

What carries loss is found by character offsets, never by looking for token ids: a row is rendered to one text, the
places of its responses in that text are known, and a token is a target if it covers at least one character of a
response. A token that straddles prompt and response is therefore a target: in "Sentiment: {response}" the space
belongs to the first token of the answer, and without it a one-word answer would never be learned.
"""

import re
from dataclasses import dataclass

import numpy as np

from gdmpi.errors import UserError

CHUNK = 1000  # rows tokenised at once

NAMES = {  # the columns that are recognised, by the part they play
    "prompt": ("prompt", "question"),
    "response": ("response", "answer"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "messages": ("messages", "conversations"),
    "text": ("text",),
}
# the parts that make a row, in the order they are written; input may be missing
FORMS = (("prompt", "response"), ("instruction", "input", "output"), ("messages",), ("text",))
ROLES = {"prompt": "user", "instruction": "user", "input": "input", "response": "assistant", "output": "assistant"}
ROLES |= {"human": "user", "gpt": "assistant"}  # ShareGPT's words

PLAIN = "{prompt}\n{response}"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n{response}"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n{response}"
)


FIELDS = ("tokens", "target", "starts", "index", "nbytes", "group", "references")  # of Rows, those that are arrays


@dataclass(eq=False)
class Rows:
    """Tokenised rows, one behind the other in flat arrays: quick to cut, to hash and to send."""

    tokens: np.ndarray  # int32, all rows' tokens
    target: np.ndarray  # bool, whether a token carries loss; never a row's first token, which nothing predicts
    starts: np.ndarray  # int64, where each row begins, and the number of tokens last
    index: np.ndarray  # int64, each row's number in the table it was read from
    nbytes: np.ndarray | None = None  # int64, bytes of UTF-8 that each row's responses have
    group: np.ndarray | None = None  # text, of held-out rows: what their losses are also given by
    references: np.ndarray | None = None  # uint8, of held-out rows: JSON, the texts of the first ones' responses
    answers: "Rows | None" = None  # of held-out rows with labels: each row with every label, see answers.py

    def __len__(self):
        return len(self.index)

    @property
    def target_tokens(self):
        return int(np.count_nonzero(self.target))

    def row(self, i):
        """The tokens of row i and whether each carries loss."""
        place = slice(self.starts[i], self.starts[i + 1])
        return self.tokens[place], self.target[place]

    def targets_of(self, ids):
        """How many target tokens each of these rows has, as a list."""
        return [int(np.count_nonzero(self.row(i)[1])) for i in ids]

    def take(self, ids):
        """The rows with these positions, in this order."""
        ids = np.asarray(ids, np.int64)
        lengths = np.diff(self.starts)[ids]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.repeat(self.starts[ids] - starts[:-1], lengths) + np.arange(starts[-1])
        more = (None if each is None else each[ids] for each in (self.nbytes, self.group))
        return Rows(self.tokens[places], self.target[places], starts, self.index[ids], *more)

    @classmethod
    def concatenated(cls, parts):
        """The rows of several, one after the other."""
        lengths = np.concatenate([np.diff(rows.starts) for rows in parts])
        joined = (np.concatenate([getattr(rows, name) for rows in parts]) for name in ("tokens", "target"))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(*joined, starts, np.concatenate([rows.index for rows in parts]))

    def arrays(self):
        """{name: array}, to send or to save; from_arrays is the inverse."""
        own = {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}
        more = {} if self.answers is None else self.answers.arrays()
        return own | {f"answers.{name}": array for name, array in more.items()}

    @classmethod
    def from_arrays(cls, arrays):
        more = {name.removeprefix("answers."): arrays[name] for name in arrays if name.startswith("answers.")}
        own = {name: np.array(arrays[name]) for name in FIELDS if name in arrays}
        return cls(**own, answers=cls.from_arrays(more) if more else None)


# ---- laying out ----------------------------------------------------------------------------------------------------


def columns(config, table, name):
    """Which column of the table plays which part, {part: column}: configured in data.columns, or known by its name."""
    there, named = table.column_names, config.data.columns
    for part, column in named.items():
        if column not in there:
            raise UserError(f"data.columns.{part}: {name} has no column {column!r}; it has {', '.join(there)}")
    roles = {part: column for part, known in NAMES.items() for column in reversed(known) if column in there} | named
    for form in FORMS:
        if set(named) <= set(form) and all(part in roles for part in form if part != "input"):
            return {part: roles[part] for part in form if part in roles}
    raise UserError(
        f"data.columns: the columns of {name} are not recognised ({', '.join(there)}); name them, as in "
        "data.columns.prompt=COLUMN data.columns.response=COLUMN, or data.columns.text=COLUMN"
    )


def resolve_template(config, tokenizer):
    """The template to use, chat, alpaca, plain or the user's own text, and the reason for it in words."""
    template, has_chat = config.data.template, bool(getattr(tokenizer, "chat_template", None))
    if template == "auto" and has_chat:
        return "chat", "the tokenizer has a chat template"
    if template == "auto":
        return "plain", "the tokenizer has no chat template"
    if template == "chat" and not has_chat:
        raise UserError(
            "data.template: chat, but the tokenizer has no chat template; use plain, alpaca or your own text"
        )
    if template not in {"chat", "alpaca", "plain"}:
        head, response, _ = template.partition("{response}")
        if not response or "{prompt}" not in head:
            raise UserError(
                f"data.template: {template!r} is not auto, chat, alpaca or plain, "
                "nor a text with {prompt} and then {response}"
            )
    return template, "as configured"


def turns(row, where):
    """A row {part: value} as [(role, content)]: roles are text, input (Alpaca's, after user), or a conversation's."""
    if "text" in row:
        return [("text", _text(row["text"], where))]
    if "messages" in row:
        try:
            said = [(message.get("role") or message["from"], message) for message in row["messages"] or ()]
            said = [(role, message["content"] if "content" in message else message["value"]) for role, message in said]
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{where}: messages must be a list of {{role, content}} or {{from, value}}") from None
        return [(ROLES.get(role, role), _text(content, where)) for role, content in said]
    return [(ROLES[part], _text(value, where)) for part, value in row.items()]


def _text(value, where):
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, (bool, int, float)):
        return str(value)  # a class label
    raise UserError(f"{where}: holds a {type(value).__name__} where text is expected")


def render(said, template, tokenizer, where):
    """Lay out turns [(role, content)]: the text, and the places [(begin, end)] in it that carry loss.

    Those are the responses with what ends them (the template's words after {response} and the end-of-sequence
    token, or a chat template's end-of-turn marker), or a text as a whole. Blank responses carry none, nor does an
    assistant's turn that opens a conversation: it answers nothing.
    """
    if template == "chat" and said and said[0][0] != "text":
        return _render_chat(said, tokenizer, where)
    text, spans, prompt, extra, end = "", [], [], "", tokenizer.eos_token or ""
    for position, (role, content) in enumerate(said):
        if role == "input":
            extra = content
        elif role not in {"assistant", "text"}:
            prompt.append(content)
        else:
            head, tail = ("", "") if role == "text" else _layout(template, "\n".join(filter(None, prompt)), extra)
            begin, text = len(text + head), text + head + content + tail
            text += "" if end and text.endswith(end) else end
            if content.strip() and (position or role == "text"):
                spans.append((begin, len(text)))
            prompt, extra = [], ""
    return text, spans


def _layout(template, prompt, extra):
    """What comes before and after the response."""
    if template == "alpaca":
        head, _, tail = (ALPACA_INPUT if extra else ALPACA).partition("{response}")
        before, _, after = head.partition("{prompt}")
        return before + prompt + after.replace("{input}", extra), tail
    head, _, tail = (PLAIN if template == "plain" else template).partition("{response}")
    return head.replace("{prompt}", f"{prompt}\n{extra}" if extra else prompt), tail


def _render_chat(said, tokenizer, where):
    messages = []
    for role, content in said:
        if role == "input":
            messages[-1]["content"] += f"\n{content}" if content else ""
        else:
            messages.append({"role": role, "content": content})

    def written(count, **options):
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
        except Exception as error:  # a template may raise anything, and some do on purpose
            raise UserError(f"{where}: the chat template refuses it ({error}); use another data.template") from None

    text, spans = written(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before = written(i, add_generation_prompt=True)
        after = text if i + 1 == len(messages) else written(i + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{where}: the tokenizer's chat template is unusable for training, it writes a turn differently "
                "once more follows; use another data.template"
            )
        # the line break after an end-of-turn marker is never generated; without a marker it is the marker
        content = message["content"].strip()
        if content:
            _, found, marker = after[len(before) :].partition(content)
            spans.append((len(before), len(after) if found and not marker.strip() else len(after.rstrip())))
    return text, spans


# ---- tokenising ----------------------------------------------------------------------------------------------------


def encode(table, roles, tokenizer, template, max_length, ids=None, where="data.name"):
    """Tokenise rows of a table (all, or those numbered ids): (Rows, {what: count}).

    roles come from columns(), the template from resolve_template(). Rows are cut at max_length tokens; those that then
    hold no target are dropped.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "model.name: its tokenizer has no fast version, hence no character offsets; give a tokenizer.json"
        )
    ids = np.arange(len(table)) if ids is None else np.asarray(ids, np.int64)
    # a chat template writes all special tokens the model expects; other texts get the tokenizer's own, such as bos
    options = {"add_special_tokens": template != "chat" or "text" in roles, "verbose": False}
    special = re.compile("|".join(map(re.escape, filter(None, tokenizer.all_special_tokens))) or "$.")
    table, known, kept, truncated = table.select_columns(list(set(roles.values()))), {}, [], 0
    for begin in range(0, len(ids), CHUNK):
        numbers = ids[begin : begin + CHUNK].tolist()
        got = table[numbers]
        laid = []
        for i, number in enumerate(numbers):
            row = {part: got[column][i] for part, column in roles.items()}
            place = f"{where}: row {number + 1}"
            laid.append(render(turns(row, place), template, tokenizer, place))
        tokenised = _tokenise(laid, tokenizer, options, known)
        for number, (text, spans), (tokens, target, ends) in zip(numbers, laid, tokenised, strict=True):
            if target[:max_length].any():
                cut = len(tokens) > max_length
                end = ends[:max_length].max() if cut else len(text)
                said = special.sub("", "".join(text[begin : min(stop, end)] for begin, stop in spans if begin < end))
                kept.append((number, tokens[:max_length], target[:max_length], len(said.encode())))
                truncated += cut
    if len(ids) and not kept:
        raise UserError(f"{where}: no row has a response within data.max_length {max_length} tokens; raise it")
    numbers, tokens, targets, nbytes = zip(*kept, strict=True) if kept else ((), (), (), ())
    rows = Rows(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.concatenate([np.zeros(0, bool), *targets]),
        np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        np.array(numbers, np.int64),
        np.array(nbytes, np.int64),
    )
    cut = {"rows": len(ids), "dropped": len(ids) - len(rows), "truncated": truncated}
    return rows, cut | counts(rows)


def counts(rows):
    """{what: count} of the rows kept; answered is those that have candidates."""
    answered = {} if rows.answers is None else {"answered": len(np.unique(rows.answers.index))}
    return {"kept": len(rows), "tokens": len(rows.tokens), "target_tokens": rows.target_tokens} | answered


def _tokenise(laid, tokenizer, options, known):
    """Yield (tokens, targets, where each token ends in the text) of each (text, spans).

    known remembers which characters are lost.
    """
    options = options | {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoded = tokenizer([text for text, _ in laid], **options)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for i, (text, spans) in enumerate(laid):
        ids, added = encoded["input_ids"][i], np.array(encoded["special_tokens_mask"][i], bool)
        offsets, spans = _mended(text, spans, ids, encoded["offset_mapping"][i], tokenizer, options, known)
        first, last = np.array(offsets, np.int64).reshape(-1, 2).T
        target = np.zeros(len(ids), bool)
        for begin, end in spans:
            target |= (last > begin) & (first < end)
        target &= ~added
        # the text may begin or end with the special token that the tokenizer also adds there
        twice = [len(ids) > 1 and added[a] and ids[a] == ids[b] == end for a, b, end in ((0, 1, bos), (-1, -2, eos))]
        keep = slice(int(twice[0]), len(ids) - int(twice[1]))
        target[keep][:1] = False
        yield np.array(ids[keep], np.int32), target[keep], last[keep]


def _mended(text, spans, ids, offsets, tokenizer, options, known):
    """The offsets and spans in a text without the characters that the tokenizer loses, where it loses any.

    A vocabulary that lacks a character, and has neither bytes nor an unknown token to stand for it, drops it without
    a trace, and the offsets of all that follows are too small. The remaining text has the same tokens, and right ones.
    Where lost characters come first, though, they may be all that had a space written before what follows: then the
    first of them becomes that space, in the text's beginning or behind every special token, whichever has those tokens.
    """
    for character in set(text) - known.keys():
        once, twice = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (character, character * 2))
        known[character] = not character.isspace() and once == twice and tokenizer.unk_token_id not in once
    kept = ["" if known[character] else character for character in text]
    if all(kept):
        return offsets, spans
    special, begins = sorted(tokenizer.get_added_vocab(), key=len, reverse=True), [0]
    for found in re.finditer("|".join(map(re.escape, special)) or "$.", text):
        kept[slice(*found.span())] = found[0]  # a special token is not made of characters
        begins.append(found.end())
    lost = [place for place in begins if place < len(kept) and not kept[place]]
    for spaces in ([], [0] if lost[:1] == [0] else [], lost):
        written = [" " if place in spaces else piece for place, piece in enumerate(kept)]
        again = tokenizer("".join(written), **options)
        if again["input_ids"] == ids:
            places = np.cumsum([0, *map(len, written)])
            return again["offset_mapping"], [(places[begin], places[end]) for begin, end in spans]
    return offsets, spans  # a tokenizer that cuts at words: only the offsets within a word are wrong
