"""How far it is: bars on a terminal, lines elsewhere, nothing when it is not wanted."""

import os
import pty
import re
import subprocess
import sys
import termios

from cerwu_gpu.progress import counted, tracked

LOOP = """
import time
from cerwu_gpu.progress import counted, tracked
with counted(3, what="blocks", unit="block", shown=True, interval=0) as bar:
    for _ in range(3):
        time.sleep(0.01)
        bar.update()
for _ in tracked(range(200), what="windows", unit="window", shown=True):
    time.sleep(0.0005)
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}


def test_a_file_gets_a_line_for_each_block_and_few_for_many_short_turns() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOOP], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.stdout == ""
    assert "\r" not in result.stderr
    time_of_day, elapsed = r"\d\d:\d\d:\d\d", r"\d\d:\d\d so far, \d\d:\d\d left"
    expected = [*(f"blocks {n}/3" for n in (1, 2, 3)), "windows 200/200"]
    for line, start in zip(result.stderr.splitlines(), expected, strict=True):
        assert re.fullmatch(rf"{time_of_day} {start}, {elapsed}", line), line


def test_a_terminal_gets_bars_that_draw_over_themselves() -> None:
    terminal, program = pty.openpty()
    termios.tcsetwinsize(program, (25, 80))
    subprocess.run(
        [sys.executable, "-c", LOOP], stderr=program, stdout=subprocess.DEVNULL, env=ENVIRONMENT
    )
    os.close(program)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # Linux's way to say that a terminal has no other end any more
        pass
    os.close(terminal)
    text = shown.decode()
    assert text.count("\r") > 4
    assert re.search(r"blocks: 100%.*3/3 \[\d\d:\d\d<\d\d:\d\d", text)
    assert re.search(r"windows: 100%.*200/200", text)


def test_nothing_is_shown_unless_it_is_wanted(capsys) -> None:
    assert list(tracked([1, 2], what="x", unit="y", shown=False)) == [1, 2]
    with counted(2, what="x", unit="y", shown=False, interval=0) as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_what_stops_early_says_where(capsys) -> None:
    for number in tracked(range(9), what="turns", unit="turn", shown=True):
        if number == 4:
            break
    with counted(9, what="never begun", unit="turn", shown=True):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert "turns 4/9" in line
