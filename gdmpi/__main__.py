"""The command line: python -m gdmpi [run|resume|check|show|plot|verify|export|eval|audit|bench] ...

Exit status: 0 done; 2 the input is wrong (one line says what); 1 a failure while running; 75 stopped early on
purpose, resume to go on.
"""

import argparse
import gc
import signal
import sys

from gdmpi import __version__, launcher

COMMANDS = ("run", "resume", "check", "show", "plot", "verify", "export", "eval", "audit", "bench")
SETTINGS = "section.key=value, as in train.lr=1e-4; wins over the file"


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, on rank 0."""

    def error(self, message):
        """Say it and exit with 2."""
        if launcher.rank() == 0:
            print(f"gdmpi: {message}; see {self.prog} --help", file=sys.stderr, flush=True)
        sys.exit(2)


def parser():
    """The command line's grammar."""
    top = Parser(
        prog="python -m gdmpi",
        description="Federated fine-tuning of large language models over MPI. Bare: run the built-in demo.",
        epilog="Start run, resume, eval, audit and bench under mpirun or srun for several ranks, as in mpirun -n 6 "
        "python -m gdmpi",
    )
    top.add_argument("--version", action="version", version=f"gdmpi {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, text):
        return commands.add_parser(name, help=text, description=text)

    run = command("run", "run a configuration; without one, the demo")
    run.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help=SETTINGS)
    run.add_argument(
        "--continue", dest="go_on", action="store_true", help="if the run has round files, go on from the newest"
    )
    resume = command("resume", "go on with a run from its newest whole round file, or from the one that is named")
    resume.add_argument("source", metavar="RUN_DIR|ROUND_FILE")
    resume.add_argument("words", nargs="*", metavar="section.key=value", help="such as run.rounds=20")
    check = command("check", "say what a configuration means, sends and needs, without training")
    check.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help=SETTINGS)
    check.add_argument(
        "--method",
        action="append",
        metavar="FILE.py|NAME",
        help="try whether a method keeps to what all must, on the demo",
    )
    check.add_argument("--download", action="store_true", help="fetch model and data into run.cache (on a login node)")
    show = command("show", "one run: its rounds; several: a comparison, in which runs that differ in the seed are one")
    show.add_argument("runs", nargs="+", metavar="RUN_DIR|ROUND_FILE")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text", help="of the table")
    form.add_argument("--json", action="store_true", help="each run with all of its rounds, for programs")
    show.add_argument(
        "--at", metavar="WHAT=AMOUNT", help="compare at equal rounds=10, bytes=50MB, tokens=2e6 or seconds=600"
    )
    plot = command("plot", "draw losses over rounds, bytes and seconds; where the time went; the clients' rows")
    plot.add_argument("runs", nargs="+", metavar="RUN_DIR|ROUND_FILE")
    plot.add_argument(
        "-o", "--out", default="plot.png", metavar="FILE", help=".png, .pdf or .svg (default: %(default)s)"
    )
    verify = command("verify", "recompute all hashes of a run and say what is whole")
    verify.add_argument("run", metavar="RUN_DIR")
    export = command("export", "write the adapter as a PEFT directory, or merged into the model")
    export.add_argument("source", metavar="RUN_DIR|ROUND_FILE")
    export.add_argument("out", metavar="OUT_DIR")
    export.add_argument("--merge", action="store_true", help="a plain model without adapter")
    evaluate = command(
        "eval", "loss and perplexity on held-out rows, of a run, a round file, a PEFT adapter or a model"
    )
    evaluate.add_argument("source", metavar="RUN_DIR|ROUND_FILE|ADAPTER_DIR|MODEL_DIR")
    evaluate.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="whose data to use")
    evaluate.add_argument(
        "--texts", metavar="FILE", help="write prompts, answers and references there, with evaluation.generate=50"
    )
    audit = command("audit", "whether a run's training rows can be told from its test rows: membership inference")
    audit.add_argument("source", metavar="RUN_DIR|ROUND_FILE")
    audit.add_argument("words", nargs="*", metavar="key=value", help="rows=1000, at most; client=3, its rows alone")
    audit.add_argument("--json", action="store_true", help="for programs")
    audit.add_argument("--out", metavar="FILE.json", help="write the result to a file, too")
    bench = command("bench", "time the exchange of a round on this cluster, against bare MPI and the naive way")
    bench.add_argument("--parameters", type=int, default=2_101_248, help="of the adapter (default: %(default)s)")
    bench.add_argument("--rounds", type=int, default=30, help="timed (default: %(default)s)")
    return top


def main(argv=None):
    """Run a command line and return the exit status; what the user can mend is said in one line, on rank 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0] not in COMMANDS and not argv[0].startswith("-")):
        argv.insert(0, "run")
    grammar = parser()
    args, more = grammar.parse_known_args(argv)
    if more and (not hasattr(args, "words") or any(word.startswith("-") for word in more)):
        grammar.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # words that stand behind an option, which argparse takes for too many
        args.words += more
    # importing and building make a million objects that stay: collecting garbage among them costs a fifth of the start
    gc.disable()
    from gdmpi import stopping

    if args.command in ("run", "resume"):
        for name in ("SIGTERM", "SIGUSR1"):  # at once: a signal that comes during the start shall not kill
            stopping.listen(name)
    from gdmpi import commands
    from gdmpi.errors import PeerError, UserError

    try:
        return getattr(commands, args.command)(args) or 0
    except (UserError, PeerError) as error:
        if launcher.rank() == 0:
            print(f"gdmpi: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has seen enough
        return 0


if __name__ == "__main__":
    status = main()
    # srun --kill-on-bad-exit sends TERM to all as soon as the first has left: each shall end with its own status
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(status)
