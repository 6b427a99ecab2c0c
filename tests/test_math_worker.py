"""Mathematical answers are compared in a process that may be stopped at any time."""

import importlib.util
import re
import threading

from medicalgpt.errors import UserError
from medicalgpt.rewards import math_worker
from medicalgpt.rewards.grading import number_score
from medicalgpt.rewards.math_worker import same_value

import pytest
from loguru import logger


@pytest.mark.parametrize(
    "gold, answer, same",
    [
        ("7", "14/2", True),
        ("\\frac{1}{2}", "0.5", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("7", "8", False),
        ("x+1", "x+2", False),
        # Not mathematics, or nothing at all.
        ("7", "{{{", False),
        ("7", "", False),
    ],
)
def test_values_are_compared_and_not_their_spelling(gold, answer, same):
    assert same_value(gold, answer) is same


def test_a_long_answer_is_not_sent(monkeypatch):
    monkeypatch.setattr(math_worker, "_running_worker", lambda: pytest.fail("the process was asked"))
    long = "1" + "+0" * (math_worker.LONGEST_ANSWER // 2)
    assert len(long) > math_worker.LONGEST_ANSWER and not same_value("1", long) and not same_value(long, "1")


def test_an_answer_is_compared_once():
    assert same_value("29", "58/2")
    first = math_worker._running_worker()
    math_worker.stop_worker()
    assert same_value("29", "58/2") and math_worker._worker is None and first.poll() is not None


def test_a_comparison_that_does_not_end_is_cut_off_and_logged():
    lines = []
    sink = logger.add(lines.append, format="{message}")
    try:
        assert not same_value("7", "9^{9^{9^{9}}}")
    finally:
        logger.remove(sink)
    assert "no result within 2 s and 2 GB, counted as wrong: '9^{9^{9^{9}}}'" in "".join(lines)
    assert same_value("7", "35/5")


def test_a_worker_that_dies_is_replaced():
    assert same_value("21", "42/2")
    math_worker._worker.kill()
    math_worker._worker.wait()
    assert same_value("23", "46/2")


def test_answers_are_compared_in_threads():
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(same_value(str(n), f"{2 * n}/2"))) for n in range(31, 39)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_no_answer_is_run_as_code(tmp_path):
    mark = tmp_path / "mark"
    for code in (f"__import__('os').system('touch {mark}')", f"open('{mark}','w')"):
        assert number_score("1", code) == 0.0
        assert not same_value("1", code)
    assert not mark.exists()


def test_the_message_about_a_process_that_does_not_start_names_a_command_that_runs(monkeypatch):
    math_worker.stop_worker()
    monkeypatch.setattr(math_worker.sys, "executable", "/bin/true")
    with pytest.raises(UserError, match="does not start") as caught:
        same_value("41", "82/2")
    assert math_worker._worker is None
    (module,) = re.findall(r"python -m (\S+) </dev/null", str(caught.value))
    assert importlib.util.find_spec(module) is not None
