"""What clients that learn from each other's answers have in common: rows that everybody sees, and one tokenizer."""

import numpy as np

from gdmpi import data, method, model
from gdmpi.errors import UserError
from gdmpi.words import size


def check_tokenizers(config, known, without_torch):
    """UserError if a model of model.others has another tokenizer than known: other tokens, or other numbers of them."""
    known = known.get_vocab()
    for client, name in config.model.others.items():
        where = f"model.others: client {client}: {name}"
        try:
            other = model.tokenizer(name, without_torch).get_vocab()
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('model.name: ')}") from None
        differing = {token for token in known.keys() | other if known.get(token) != other.get(token)}
        if differing:
            first = min(differing, key=lambda token: (known.get(token, len(known)), token))
            how = f"{known.get(first, 'no number')} in {config.model.name}, {other.get(first, 'no number')} there"
            what = f"another tokenizer: {len(differing):,} tokens differ, such as {first!r}, {how}"
            raise UserError(f"{where}: {what}; clients can only teach each other with the same")


def share(link, parts, prepared, tokenizer):
    """Give all ranks the public rows and the tokenizer's size; UserError if a row of a file is held out, too.

    prepared, tokenizer: at the server, data.Prepared of pooled data or None, and the tokenizer.
    """
    config = parts.config

    def read():
        cut = prepared.public if prepared else None
        return data.prepare_public_file(config, tokenizer) if cut is None else cut

    rows = link.together(lambda: read() if link.is_server else None)
    arrays = link.bcast(0, None if rows is None else rows.arrays())
    parts.public = data.Rows.from_arrays({name: np.array(array) for name, array in arrays.items()})
    parts.vocabulary = link.share(_size(tokenizer) if link.is_server else None)
    if isinstance(config.data.public, str):
        link.together(lambda: _forbid_held_out(parts))


def _forbid_held_out(parts):
    """UserError if a public row is one that this rank holds out: what is learnt from it would be tested with it.

    With labels the rows are compared with each label in place of the response, which is to say by their prompts.
    """
    public = {parts.public.row(i)[0].tobytes(): int(parts.public.index[i]) for i in range(len(parts.public))}
    for kind, parted in parts.held_out.items():
        for _, rows, _ in parted:
            held = rows if rows.answers is None else rows.answers
            for i in range(len(held)):
                if (found := public.get(held.row(i)[0].tobytes())) is not None:
                    where = f"data.public: {parts.config.data.public}: row {found + 1}"
                    raise UserError(f"{where} is a {kind} row, too: public rows must not be held out; take it out")


def described(config, tokenizer, cut):
    """A line on the public rows, if there are any; cut: those of data.Prepared. UserError as for a run."""
    check_tokenizers(config, tokenizer, without_torch=False)
    if config.data.public:
        rows = data.prepare_public_file(config, tokenizer) if cut is None else cut
        down, up = travels(config, rows, _size(tokenizer))
        sent = f"{size(down)} down and {size(up)} up per client and round"
        yield f"{'public':10}  {counted(rows):,} rows that no client trains on: {sent}"


def _size(tokenizer):
    return max(tokenizer.get_vocab().values()) + 1


def counted(public):
    """How many public rows there are."""
    return len(np.unique(public.index))


def travels(config, public, vocabulary):
    """[down, up]: the bytes that a client receives and sends in a round, if the method says; None if it does not."""
    if public is None:
        return None
    return method.load(config.method.name).Server.travels(method.options(config), public, vocabulary)
