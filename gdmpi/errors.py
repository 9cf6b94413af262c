"""What ends a run before its time, each read by the user in one line."""

LESS = (
    "less memory is needed with a smaller train.pass_tokens or data.max_length, train.checkpointing=true or "
    "model.quantize=nf4 (gdmpi check estimates it)"
)


class UserError(Exception):
    """The user's input is wrong: one line says where, what, and what to do. The command line exits with 2."""

    def __init__(self, text):
        super().__init__(" ".join(str(text).splitlines()))  # what it quotes may hold line breaks


class PeerError(Exception):
    """Some rank failed and all ranks know: the message names round, client, rank and host. Exit status 1."""


class Paused(Exception):
    """The run stops early on purpose, on all ranks; what is done is saved, and a resume goes on. Exit status 75."""


def first_line(error):
    """An exception's message, or only its type's name, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def locate(error, text):
    """Note on an exception where in the run it happened, such as 'round 7: client 3 on'."""
    error.where = text


def describe(error, place):
    """One line on a failure: what and where. UserErrors and PeerErrors speak for themselves."""
    if isinstance(error, UserError | PeerError | Paused):
        return str(error)
    where = f"{error.where} {place}" if hasattr(error, "where") else place
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{where}: {type(error).__name__}: {first}{f'; {LESS}' * out_of_memory(error)}"


def out_of_memory(error):
    """Whether an exception says that memory, of the GPU or the host, was not enough; torch names the CPU's only so."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)
