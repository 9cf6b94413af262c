"""What a run says: plain lines for files and pipes, a bar for a person, nothing from other ranks."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import launcher

from gdmpi import log


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def screen(text):
    """What a terminal shows in the end: its lines, after carriage returns and what overwrites what."""
    lines, column = [""], 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", text, re.S):
        if piece == "\n":
            lines, column = [*lines, ""], column
        elif piece == "\r":
            column = 0
        elif piece.startswith("\x1b"):
            assert piece.endswith(("m", "K", "h", "l")), repr(piece)  # colours, erasing; nothing moves the cursor
        else:
            lines[-1] = lines[-1][:column].ljust(column) + piece + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in "\n".join(lines).splitlines()]


def shown(terminal):
    """screen() of a Terminal, which like a real one starts a new line at its beginning."""
    return screen(terminal.getvalue().replace("\n", "\r\n"))


# ---- without a terminal ---------------------------------------------------------------------------------------------


def test_without_a_terminal_lines_are_plain():
    stream = io.StringIO()
    voice = log.Log(True, stream)
    assert not voice.interactive
    voice.say("first")
    voice.round_bar(1, 3, 10)
    voice.progress((0, 5, 10, 0))
    voice.warn("look here")
    voice.close_bar()
    voice.say("two\nlines")
    assert stream.getvalue() == "first\nwarning: look here\ntwo\nlines\n"


def test_other_ranks_say_nothing_and_write_nothing(tmp_path, capfd):
    stream = Terminal()
    voice = log.Log(False, stream)
    assert not voice.interactive
    voice.open(tmp_path / "log.txt")
    voice.say("hello")
    voice.warn("hello")
    voice.note("hello")
    voice.round_bar(1, 3, 10)
    voice.progress((0, 5, 10, 0))
    voice.close_bar()
    assert stream.getvalue() == "" and not (tmp_path / "log.txt").exists()
    assert capfd.readouterr() == ("", "")


def test_speaks_on_standard_output_by_default(capsys):
    log.Log(True).say("here")
    assert capsys.readouterr() == ("here\n", "")


# ---- the file -------------------------------------------------------------------------------------------------------

LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (.*)")


def test_log_file_has_times_and_goes_on_after_what_it_holds(tmp_path):
    path = tmp_path / "log.txt"
    for word in ("before", "after"):
        voice = log.Log(True, io.StringIO())
        voice.say("not yet in the file")
        voice.open(path)
        voice.say(f"{word} the break")
        voice.note("for the file alone")
        voice.warn("two\nlines")
        assert "alone" not in voice.stream.getvalue()
        lines = path.read_text(encoding="utf-8").splitlines()  # flushed: a crash loses nothing
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches)
    said = ["the break", "for the file alone", "warning: two", "lines"]
    assert [match[2] for match in matches] == [f"before {said[0]}", *said[1:], f"after {said[0]}", *said[1:]]
    for match in matches:
        assert abs(time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")) - time.time()) < 100


def test_an_empty_line_has_its_time(tmp_path):
    voice = log.Log(True, io.StringIO())
    voice.open(tmp_path / "log.txt")
    voice.say()
    assert LINE.fullmatch((tmp_path / "log.txt").read_text().splitlines()[0])[2] == ""


# ---- the bar --------------------------------------------------------------------------------------------------------


def test_bar_moves_with_the_notes_of_all_clients_and_goes():
    stream = Terminal()
    voice = log.Log(True, stream)
    assert voice.interactive
    voice.say("a line before")
    voice.round_bar(2, 30, 20)
    assert "round 2/30   0%" in stream.getvalue() and "step 0/20" in stream.getvalue()
    for note, steps in [((0, 1, 10), 1), ((3, 4, 10), 5), ((0, 5, 10), 9), ((3, 4, 10), 9), ((0, 3, 10), 9)]:
        voice.progress((*note, 100 * note[1]))
        assert voice.bar.n == steps
    voice.bar.refresh()
    assert "step 9/20" in stream.getvalue() and " 45%" in shown(stream)[-1]
    assert re.search(r"\[\d\d:\d\d<[\d:?]+, [\d,]+ tokens/s\]", shown(stream)[-1])
    voice.say("a line in between")
    assert shown(stream)[:2] == ["a line before", "a line in between"] and "round 2/30" in shown(stream)[2]
    voice.close_bar()
    voice.say("a line after")
    assert shown(stream) == ["a line before", "a line in between", "a line after"]


def test_a_new_round_begins_a_new_bar():
    stream = Terminal()
    voice = log.Log(True, stream)
    voice.round_bar(1, 2, 4)
    voice.progress((0, 4, 4, 0))
    voice.round_bar(2, 2, 4)
    assert voice.bar.n == 0
    voice.progress((0, 1, 4, 0))
    assert voice.bar.n == 1
    voice.close_bar()
    voice.close_bar()
    voice.progress((0, 2, 4, 0))  # a note that comes after the round
    assert [line for line in shown(stream) if line] == []


# ---- a real one -----------------------------------------------------------------------------------------------------


def in_a_terminal(words, timeout=120):
    """(exit status, all that was written) of a command in a pseudo-terminal."""
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", 24, 100, 0, 0)  # rows and columns: where there are no rows tqdm draws nothing
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    _, env = launcher(None)
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    pieces, end = [], time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 1)[0]:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # Linux says so when the other end is closed
                    break
                if not piece:
                    break
                pieces.append(piece)
        else:
            pytest.fail(f"hangs: {b''.join(pieces)[-1000:]!r}")
        return process.wait(timeout=10), b"".join(pieces).decode()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def test_run_in_a_terminal_shows_a_bar_that_moves_and_leaves_lines(tiny):
    settings = ["run.name=terminal", "run.rounds=2", "train.epochs=8"]
    code, text = in_a_terminal([sys.executable, "-m", "gdmpi", "run", str(tiny / "tiny.yaml"), *settings])
    assert code == 0, text
    for t in (1, 2):
        shares = [int(share) for share in re.findall(rf"round {t}/2 +(\d+)% ?\|", text)]
        assert shares and shares == sorted(shares), text
        assert max(shares) > 50, f"the bar of round {t} stands still: {shares}"
    lines = screen(text)
    assert not any("%|" in line or "% |" in line for line in lines)
    rounds = [line for line in lines if line.startswith("round ")]
    assert len(rounds) == 2
    for t, line in enumerate(rounds, 1):
        losses = r"train \d\.\d{4}  validation \d\.\d{4}  perplexity [\d.]+"
        assert re.fullmatch(rf"round {t}/2  {losses}  up .*B  [\d,]+ tokens/s  [\d.]+ s", line)
    assert any(re.fullmatch(r"adapter [0-9a-f]{64}", line) for line in lines)
    assert lines[-1].startswith("  python -m gdmpi export ")
    written = (tiny / "runs" / "terminal" / "log.txt").read_text()
    assert "\r" not in written and "%|" not in written
    assert all(LINE.fullmatch(line) for line in written.splitlines())
