"""The crash benchmark in small: 20 kills and faults of a run."""

import json
import os
import shutil
import sys
from unittest.mock import patch

from benchmarks import crash

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_twenty_kills_and_faults_lose_nothing(tmp_path, capsys):
    command = ["crash", "--kills", "14", "--faults", "6", "--seed", "3", "--output", str(tmp_path / "found.json")]
    command += ["--stages", "sft", "--weights", "lora", "--processes", "1", "--saves", "rotating"]
    with patch.object(sys, "argv", command), patch.dict(os.environ), pytest.raises(SystemExit) as end:
        crash.main()
    assert end.value.code == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    counts = {what: sum(count for name, *_, count in found["counts"] if name == what) for what in ("kill", "fault")}
    assert counts == {"kill": 14, "fault": 6} and found["failures"] == []
