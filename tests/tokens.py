"""Tokenizers and rows for the tests of data."""

import datasets
import tokenizers

from gdmpi import data, encode
from gdmpi.config import Config

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"prompt": f"How old is number {i}?", "response": f"It is {i} years, é☃ NA.", "topic": i % 3} for i in range(30)
]
TEXTS = [f"{row['prompt']} {row['response']}" for row in ROWS] + [encode.ALPACA_INPUT, "<|im_start|>user assistant\n"]


def byte_level(chat_template=None, bos=False, eos=False, trim_offsets=False):
    """A byte-level BPE tokenizer trained on a few lines; bos and eos say what it adds by itself."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    added = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), added])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=chat_template, pad_token="</s>"
    )


PLAIN = byte_level()
BOS = byte_level(bos=True)
CHAT = byte_level(CHATML)


def config(**sections):
    return Config.model_validate(sections)


def encoded(rows, tokenizer=PLAIN, template="plain", max_length=500):
    """Rows (dicts) encoded, and the decoded targets of each that was kept."""
    table = datasets.Dataset.from_list(rows)
    roles = data.columns(config(), table, "rows")
    out, counts = data.encode(table, roles, tokenizer, template, max_length)
    return out, counts, [tokenizer.decode(out.row(i)[0][out.row(i)[1]]) for i in range(len(out))]


def whole(rows, tokenizer, i=0):
    return tokenizer.decode(rows.row(i)[0])
