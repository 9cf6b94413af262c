"""What a rank says of its own failure, and the watchdog over phases that may hang."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager


class Watchdog:
    """Ends a job that hangs and keeps tracebacks; rank and place ("rank 2 @ node5") are set by what inherits it."""

    errors_directory = None  # where tracebacks go; set once there is a run directory

    @contextmanager
    def phase(self, seconds):
        """A watchdog over a phase: past the given seconds every rank prints where it stands, and the job ends."""
        timer = threading.Timer(seconds, self._hung, (seconds,))
        timer.daemon = True
        timer.start()
        # should Python itself be stuck, faulthandler needs no interpreter; it comes later because it cannot say more
        faulthandler.dump_traceback_later(seconds + 30, exit=True)
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _hung(self, seconds):
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            text = f"{self.place}: not done after {seconds:g} s (run.timeout); it stands here:\n{file.read()}"
        print(f"gdmpi: {text}", file=sys.stderr, flush=True)
        self._keep("hang-", text)
        time.sleep(2)  # the others say where they stand at about the same time; the first exit ends the job
        os._exit(1)

    def on_failure(self, error):
        """Keep the traceback of this rank's failure: in the run's errors/ if there is one, else on stderr."""
        text = "".join(traceback.format_exception(error))
        if not self._keep("", f"{self.place}\n{text}"):
            print(text, file=sys.stderr, flush=True)

    def _keep(self, prefix, text):
        try:
            self.errors_directory.mkdir(parents=True, exist_ok=True)
            (self.errors_directory / f"{prefix}rank-{self.rank:04d}.txt").write_text(text, encoding="utf-8")
        except (AttributeError, OSError):  # no directory yet, or none that can be written
            return False
        return True
