"""Progress where the output is no terminal: a line a minute."""

from __future__ import annotations

import pytest
from rich.progress import Progress

from testbed.model.progress import Bars


def test_a_line_a_minute_says_what_is_done_the_rate_the_success_and_the_time_left() -> None:
    now, lines = [0.0], list[str]()
    shown = Bars(Progress(disable=True), lines.append, lambda: now[0])
    for second in range(0, 200, 20):
        now[0] = float(second)
        shown.advance("finetune", second // 2, 200, 0.5)
    assert lines == [
        "finetune: 30 of 200, 0.5/s, success 50%, 0:05:40 left",
        "finetune: 60 of 200, 0.5/s, success 50%, 0:04:40 left",
        "finetune: 90 of 200, 0.5/s, success 50%, 0:03:40 left",
    ]


def test_a_terminal_gets_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    shown = Bars(Progress(disable=True), None, lambda: now[0])
    for second in (0, 100, 200):
        now[0] = float(second)
        shown.advance("finetune", second, 400)
    assert capsys.readouterr() == ("", "")
