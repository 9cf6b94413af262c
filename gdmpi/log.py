"""What a run says: on rank 0's terminal, as lines or with a bar, and in the run directory's log.txt."""

import fcntl
import os
import sys
import time
from pathlib import Path

from gdmpi.errors import UserError

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun", "srun")  # as their processes are called, or begin


class Log:
    """Rank 0 speaks for the run; on other ranks every method does nothing."""

    def __init__(self, speaks, stream=None):
        self.speaks, self.stream, self.file, self.bar = speaks, stream or sys.stdout, None, None
        self.interactive = speaks and (self.stream.isatty() or (stream is None and _launcher_on_terminal()))

    def open(self, path):
        """Also write to a file from now on, after what is already in it; UserError if another run writes to it.

        The lock is the kernel's: it goes with the process, however that ends, and holds across nodes where the file
        system knows locks.
        """
        if not self.speaks:
            return
        self.file = path.open("a", encoding="utf-8")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            self.file = None
            raise UserError(
                f"{path.parent}: another run is writing there; wait for it, or choose another run.name"
            ) from None
        except OSError as error:
            self.note(f"this file system knows no locks ({error.strerror}): nothing keeps a second run out")

    def close(self):
        """Take down the bar and let go of the file."""
        self.close_bar()
        if self.file:
            self.file.close()
            self.file = None

    def say(self, text=""):
        """A line (or several) for the user and for the file."""
        if not self.speaks:
            return
        if self.bar is not None:
            self.bar.clear()
        print(text, file=self.stream, flush=True)
        if self.bar is not None:
            self.bar.refresh()
        self.note(text)

    def warn(self, text):
        """A line that should not be overlooked."""
        self.say(f"warning: {text}")

    def note(self, text):
        """Lines for the file alone, with the time."""
        if self.file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self.file.write("".join(f"{stamp}  {line}\n" for line in text.splitlines() or [""]))
            self.file.flush()

    def round_bar(self, t, rounds, steps):
        """Show a bar over all optimiser steps of round t, if a person is looking."""
        if not self.interactive:
            return
        from tqdm import tqdm

        self.close_bar()
        form = "{desc} {percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(
            total=steps, desc=f"round {t}/{rounds}", leave=False, file=self.stream, ncols=88, bar_format=form
        )
        self.done, self.tokens = {}, {}

    def progress(self, note):
        """Take in a worker's note (client, steps done, steps of the round, target tokens so far)."""
        client, done, _, tokens = note
        if self.bar is not None:
            self.tokens[client] = tokens
            speed = sum(self.tokens.values()) / max(self.bar.format_dict["elapsed"], 1e-3)
            self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            self.bar.update(max(0, done - self.done.get(client, 0)))
            self.done[client] = done

    def close_bar(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _launcher_on_terminal():
    """Whether this process writes through a launcher on this machine that itself writes to a terminal.

    Under mpirun every rank's output is a pipe; whether a person is looking, the launcher's own output tells.
    """
    process = os.getppid()
    while process > 1:
        place = Path(f"/proc/{process}")
        try:
            name = (place / "comm").read_text().strip()
            if name.startswith(LAUNCHERS):
                return str((place / "fd" / "1").readlink()).startswith(("/dev/pts/", "/dev/tty"))
            process = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False  # not Linux, or not ours to see
    return False
