"""Generation: greedy answers to held-out prompts, and how near they come to their references: BLEU, ROUGE-L and chrF.

Prompts are answered in the batches of evaluate.plan(), dealt over the ranks as those are, so that the answers are the
same for any number of ranks. A batch is padded at its left and goes through the model's own generate(). What the ranks
send are tokens, and the references, which tokens cannot give back in every vocabulary; the server makes texts of them.
"""

import contextlib
import functools
import importlib.util
import json
import math

import numpy as np

from gdmpi import checkpoint, evaluate, hosting
from gdmpi.encode import render, resolve_template, turns
from gdmpi.errors import UserError

FILE = "generated.jsonl"  # of the run's directory
PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}  # modules, and what pip calls them
TOKENS = 16384  # positions in a pass, those to come included; as evaluate.BATCH no setting, for the last bits' sake


# ---- before the run ------------------------------------------------------------------------------------------------


def check(config):
    """UserError if generation is asked for and a package is missing, or there is no one model to generate with."""
    if not config.evaluation.generate:
        return
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        what = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed"
        raise UserError(f"evaluation.generate: {what}; pip install 'gdmpi[text]'")
    if hosting.personal(config):
        one, folder = ("each", "adapter/0000") if hosting.scattered(config) else ("the server's", "adapter")
        raise UserError(
            f"evaluation.generate: with method.name {config.method.name} each client has its own adapter; leave it 0, "
            f"and generate with {one} as in 'eval RUN_DIR/{folder} RUN_DIR/config.yaml evaluation.generate=50'"
        )


def part(config):
    """Whose prompts are answered: those of the test rows, or where there are none of the validation rows."""
    return "test" if config.data.test != 0 else "validation"


def references(config, key, table, roles, rows, where, client=None):
    """Rows.references for the held-out rows of a table; None unless theirs are the prompts to be answered.

    key: test or validation. client: whose file the table is, if it is one's; all clients then have equally many
    prompts, if their files have. Raises UserError for rows without prompts.
    """
    count, clients = config.evaluation.generate, config.clients.count
    if not count or key != part(config):
        return None
    if "text" in roles:
        raise UserError(f"evaluation.generate: {where}: has text alone, and no prompts to answer; leave it 0")
    own = count if client is None else count // clients + (client < count % clients)
    numbers = rows.index[:own].tolist()
    got = table.select_columns(list(set(roles.values())))[numbers] if numbers else {}
    found = []
    for i, number in enumerate(numbers):
        row = {role: got[column][i] for role, column in roles.items()}
        found.append(_first_response(turns(row, f"{where}: row {number + 1}")))
    return np.frombuffer(json.dumps(found).encode(), np.uint8)


def _first_response(said):
    """The text of the first of a row's turns whose tokens encode() makes targets."""
    responses = (text.strip() for position, (role, text) in enumerate(said) if position and role == "assistant")
    return next(filter(None, responses), "")


def _references(rows):
    return [] if rows.references is None else json.loads(rows.references.tobytes())


def fits(link, parts):
    """UserError on all ranks alike if there are no prompts, or no room for answers; all ranks call it."""
    config = parts.config
    if not config.evaluation.generate:
        return
    link.together(lambda: parts.trainable and _room(parts.trainable, config.evaluation.new_tokens))
    if not any(link.agree(sum(len(_references(rows)) for _, rows, _ in parts.held_out.get(part(config), ())))):
        raise UserError(f"evaluation.generate: there are no {part(config)} rows, so no prompts to answer; leave it 0")


def _room(model, new):
    """How many tokens of a prompt a model takes before new ones; None if it is not limited; UserError if none."""
    from gdmpi import forward

    settings = forward.unwrapped(model.model).config.get_text_config()
    context = getattr(settings, "max_position_embeddings", None)
    if context is not None and context <= new:
        raise UserError(
            f"evaluation.new_tokens: {new} leave no room for a prompt in the model's {context} positions; lower it"
        )
    return context and context - new


def ends(config, tokenizer):
    """The tokens that end an answer: that of the sequence, and with a chat template that of a turn; a sorted list."""
    found = {tokenizer.eos_token_id}
    if resolve_template(config, tokenizer)[0] == "chat":
        text, spans = render([("user", "a"), ("assistant", "b")], "chat", tokenizer, "data.template")
        last = tokenizer(text[: spans[-1][1]], add_special_tokens=False)["input_ids"][-1]
        found |= {last} & {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return sorted(found - {None})


# ---- on the client ranks -------------------------------------------------------------------------------------------


def answers(model, rows, wanted, ends, new):
    """{batch number: [{"row", "group", "prompt", "cut", "answer", "reference"}]} for wanted batches of plan(rows).

    Of the rows that have references; prompt and answer are lists of tokens. ends: what ends an answer; new: the most
    tokens that one has. A prompt too long for the model's positions loses its beginning (cut), as in
    lm-evaluation-harness.
    """
    result, batches, texts, room = {}, evaluate.plan(rows), _references(rows), _room(model, new)
    for number in wanted:
        prompts = {i: _prompt(rows, i) for i in batches[number] if i < len(texts)}
        shown = {i: prompt if room is None else prompt[-room:] for i, prompt in prompts.items()}
        found = {}
        for ids in _passes({i: len(prompt) for i, prompt in shown.items()}, new):
            found |= zip(ids, greedy(model, [shown[i] for i in ids], ends, new), strict=True)
        result[number] = [
            {
                "row": int(rows.index[i]),
                "group": None if rows.group is None else str(rows.group[i]),
                "prompt": shown[i].tolist(),
                "cut": len(shown[i]) < len(prompts[i]),
                "answer": found[i].tolist(),
                "reference": texts[i],
            }
            for i in prompts
        ]
    return result


def _prompt(rows, i):
    """The tokens of row i before the first that carries loss."""
    tokens, target = rows.row(i)
    return tokens[: int(np.argmax(target))]


def _passes(lengths, new):
    """Cut the ids of {id: length} into passes of at most TOKENS positions, or of one prompt; like lengths together."""
    groups = [[]]
    for i in sorted(lengths, key=lengths.get):
        if groups[-1] and (len(groups[-1]) + 1) * (lengths[i] + new) > TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups if lengths else []


def largest_pass(config):
    """The most positions, those of the answers included, that go through the model at once."""
    length = config.data.max_length + config.evaluation.new_tokens
    return max(length, min(evaluate.BATCH * length, config.evaluation.generate * length, TOKENS))


def greedy(model, prompts, ends, new):
    """Answers [tokens] to prompts [tokens], each token the likeliest after those before it, without what ends them.

    The prompts are a batch. It is computed in the precision of training and evaluation, with cached keys and values.
    """
    import torch
    import transformers

    shape = len(prompts), max(map(len, prompts))
    tokens, attention = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, prompt in enumerate(prompts):
        tokens[i, shape[1] - len(prompt) :], attention[i, shape[1] - len(prompt) :] = prompt, 1
    inputs = {"input_ids": tokens, "attention_mask": attention}
    inputs = {name: torch.from_numpy(array).to(model.device) for name, array in inputs.items()}
    settings = transformers.GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, max_new_tokens=new, eos_token_id=ends or None, pad_token_id=0
    )
    model.model.eval()
    forward = model.forward
    lower = torch.autocast(model.device.type, forward.dtype) if forward.autocast else contextlib.nullcontext()
    # no inference mode: what a model keeps of it, such as longer rotary tables, training could not use
    with _as_it_is(forward.base), torch.no_grad(), lower:
        found = model.model.generate(**inputs, generation_config=settings)[:, shape[1] :].cpu().numpy()
    stops = [np.flatnonzero(np.isin(answer, ends)) for answer in found]
    return [answer[: stop[0]] if len(stop) else answer for answer, stop in zip(found, stops, strict=True)]


@contextlib.contextmanager
def _as_it_is(base):
    """Within this, a model's own settings for generation (sampling, penalties) do not count, nor is it compiled.

    What torch.compile has made for passes of many rows without a cache would be made anew for each token.
    """
    import transformers

    inner = base.base_model
    own, compiled = base.generation_config, inner._compiled_call_impl
    base.generation_config, inner._compiled_call_impl = transformers.GenerationConfig(), None
    try:
        yield
    finally:
        base.generation_config, inner._compiled_call_impl = own, compiled


# ---- at the server -------------------------------------------------------------------------------------------------


def held_out(link, config, ask, path=None):
    """What scores() gives at the server, None elsewhere; prompts, answers and references go to path, one a line.

    ask(kind, measure, total): run.score() with the model as it is to be scored. All ranks call it.
    """
    from gdmpi import model

    def begin():
        tokenizer = model.tokenizer(config.model.name, without_torch=not link.is_worker)
        return tokenizer, ends(config, tokenizer)

    tokenizer, stops = link.together(lambda: begin() if link.is_server else (None, None))
    stops, new = link.share(stops), config.evaluation.new_tokens
    found = ask(part(config), functools.partial(answers, ends=stops, new=new), _in_order)

    def end():
        lines = read(found, tokenizer, config.data.template)
        if path is not None:
            checkpoint.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        cut = sum(each["cut"] for each in found)
        return scores([line["answer"] for line in lines], [line["reference"] for line in lines]) | {"cut": cut}

    return link.together(lambda: end() if link.is_server else None)


def _in_order(parts):
    """What answers() gave on all ranks, in one list: by client, if there are several, and batch."""
    batches = {key: value for part in parts for key, value in part.items()}
    order = sorted(batches, key=lambda key: [int(piece) if piece.isdigit() else -1 for piece in key.split("/")])
    return [each for key in order for each in batches[key]]


def read(found, tokenizer, template):
    """The lines {"prompt", "answer", "reference", "row", "group"} of what answers() gave: tokens made texts.

    row: number in its table, from 0 on. A prompt has its special tokens, as the model saw them; an answer has none.
    """
    tail = template.partition("{response}")[2].strip()  # a template's words after the response are no part of it
    lines = []
    for each in found:
        answer = tokenizer.decode(each["answer"], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        lines.append(
            {
                "prompt": tokenizer.decode(each["prompt"], clean_up_tokenization_spaces=False),
                "answer": answer.removesuffix(tail).strip(),
                "reference": each["reference"],
                "row": each["row"],
                "group": each["group"],
            }
        )
    return lines


def scores(answers, references):
    """{"bleu", "rouge_l", "chrf", "generated", "bleu_signature", "chrf_signature"} of texts; scores from 0 to 100.

    BLEU and chrF are those of the corpus, as sacrebleu (arXiv 1804.08771) computes them by default, which the
    signatures say; ROUGE-L is the mean of the F-measures of single answers (rouge-score, without a stemmer). An empty
    answer counts as one: it has nothing of its reference. Nothing is generated: {"generated": 0}.
    """
    import sacrebleu
    from rouge_score import rouge_scorer

    if not answers:
        return {"generated": 0}
    bleu, chrf, rouge = sacrebleu.BLEU(), sacrebleu.CHRF(), rouge_scorer.RougeScorer(["rougeL"])
    each = [
        rouge.score(reference, answer)["rougeL"].fmeasure for answer, reference in zip(answers, references, strict=True)
    ]
    return {
        "bleu": bleu.corpus_score(answers, [references]).score,
        "rouge_l": 100 * math.fsum(each) / len(each),
        "chrf": chrf.corpus_score(answers, [references]).score,
        "generated": len(answers),
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


def said(scores, kind, new):
    """Scores in words; kind: test or validation, new: the most tokens of an answer."""
    numbers = f"BLEU {scores['bleu']:.2f}, ROUGE-L {scores['rouge_l']:.2f}, chrF {scores['chrf']:.2f}"
    over = f"greedy answers of at most {new} tokens to {scores['generated']:,} {kind} prompts"
    return f"{numbers}: {over}" + f", {scores['cut']:,} of them cut at the beginning" * bool(scores["cut"])
