"""When a run stops early: on a signal, or because its job ends before another round would.

A signal is only noted by its handler. Each rank decides by itself what to do about it, at its next step or vote:
leave at once, or at the end of the round if that is near. The vote makes all ranks do the same.
"""

import math
import os
import signal
import time

JOB_END = "SLURM_JOB_END_TIME"  # seconds since the epoch
SLOWER = 1.1  # how much longer than the longest of the last rounds the next may take
LAST = 3  # rounds that the estimate looks back on

heard = None  # name of the signal that asks this process to stop


def listen(name):
    """Note a signal ("SIGTERM") from now on instead of dying of it."""
    signal.signal(getattr(signal, name), _note)


def ignore(name):
    """Do with a signal what happens by default again."""
    signal.signal(getattr(signal, name), signal.SIG_DFL)


def _note(number, frame):
    global heard
    heard = signal.Signals(number).name


class Clock:
    """How long rounds take here, and what that means for a stop.

    grace: seconds that a signal leaves, and that a job keeps for saving and ending. limit: seconds from now at which
    the job ends, if not told by the batch system.
    """

    def __init__(self, grace, limit=None):
        self.grace, self.taken, self.began = grace, [], None
        ends = [] if limit is None else [(time.time() + limit, "run.time_limit")]
        if os.environ.get(JOB_END, "").isdigit():
            ends.append((float(os.environ[JOB_END]), "the Slurm job's time limit"))
        self.end, self.why = min(ends, default=(None, None))
        self.finishing = False

    def round_begins(self):
        """A round begins, and the one before, if there was one, is over."""
        if self.began is not None:
            self.taken = [*self.taken, self._so_far()][-LAST:]
        self.began, self.finishing = time.monotonic(), False

    def _so_far(self):
        return time.monotonic() - self.began

    def leaving(self):
        """The signal's name if this rank should leave the round at once; None without a signal or near the end."""
        if heard is None or self.finishing:
            return None
        rest = max(self.taken) - self._so_far() if self.taken else math.inf
        self.finishing = rest <= self.grace
        return None if self.finishing else heard

    def out_of_time(self):
        """Why no other round fits before the job's end, in words, or None; asked near the end of a round."""
        if self.end is None:
            return None
        left, needed = self.end - time.time(), SLOWER * max(*self.taken, self._so_far(), 0)
        if left >= needed + self.grace:
            return None
        return f"{self.why} comes in {max(0, left):.0f} s, a round takes {needed:.0f} s"
