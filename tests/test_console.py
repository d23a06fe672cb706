"""Plain lines once per run, and progress that stays readable in a log file."""

import time

from lightning_robot.console import counted, disk_size, duration, progress, say


def test_only_the_first_process_speaks(capsys, monkeypatch):
    say("first")
    monkeypatch.setenv("RANK", "1")
    say("second")
    assert capsys.readouterr().out == "first\n"


def test_progress_yields_everything_and_is_silent_for_short_work(capsys):
    assert list(progress(range(5), description="counting")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_progress_writes_plain_lines_with_rate_and_remaining_time(capsys):
    for _ in progress(iter(range(4)), total=4, description="counting", unit="frames", interval=0.01):
        time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("counting: 1/4 frames, ")
    assert lines[0].endswith("left")
    assert lines[-1].startswith("counting: 4 frames done in")
    assert not any("\r" in line for line in lines)


def test_counts():
    assert [counted(count, "episode") for count in (0, 1, 2)] == ["0 episodes", "1 episode", "2 episodes"]
    assert [counted(count, "worker process") for count in (1, 2)] == ["1 worker process", "2 worker processes"]


def test_sizes():
    assert [disk_size(count) for count in (640, 12_345, 1_300_000, 310e6, 4.1e9, 166e9)] == [
        "640 B",
        "12 kB",
        "1.3 MB",
        "310 MB",
        "4.1 GB",
        "166 GB",
    ]


def test_durations():
    assert [duration(s) for s in (8, 250, 7500, 273600)] == ["8 s", "4 min 10 s", "2 h 5 min", "3 d 4 h"]
