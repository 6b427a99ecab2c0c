"""Which process speaks, and the lines that show that a long step is alive."""

import threading

from medicalgpt import logs
from medicalgpt.logs import heartbeat

import pytest

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def launched(monkeypatch):
    """What the module finds in these variables of a launcher."""

    def launched(*values: int) -> tuple:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in zip(VARIABLES, values, strict=False):
            monkeypatch.setenv(name, str(value))
        return logs.rank(), logs.world_size(), logs.local_rank(), logs.local_world_size(9), logs.is_main_process()

    return launched


def test_ranks_are_those_of_the_launcher(launched):
    assert launched() == (0, 1, 0, 9, True)
    assert launched(5, 8, 1, 4) == (5, 8, 1, 4, False)
    assert launched(0, 8) == (0, 8, 0, 9, True)


def test_a_heartbeat_tells_the_state_as_it_is_now_and_ends_with_the_block():
    lines, states, enough = [], iter(range(1000)), threading.Event()

    def write(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            enough.set()

    with pytest.raises(KeyError), heartbeat(lambda: f"row {next(states)}", seconds=0.001, write=write):
        assert enough.wait(60)
        raise KeyError
    assert lines[:3] == ["row 0", "row 1", "row 2"]
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
