"""Several hosts: two network namespaces with a cable between them, each with a name of its own, run one training."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from medicalgpt import launch
from medicalgpt.errors import STOPPED, UserError
from medicalgpt.training import hosts
from medicalgpt.training.hosts import HostWatch, has_several_hosts, require_shared_folder
from tests.helpers import ROOT, read_json, run_program, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError

LIMIT = 20
SECONDS = 500


class TwoHosts:
    """`a` and `b`, with addresses 10.77.0.1 and 10.77.0.2 and names that both know."""

    def __init__(self, folder: Path):
        self.folder, self.running = folder, {}
        self.spaces = {name: f"medicalgpt-{os.getpid()}-{name}" for name in "ab"}
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
        for space in self.spaces.values():
            ip("netns", "add", space)
        ip("link", "add", "cable-a", "netns", self.spaces["a"], "type", "veth")
        ip("-n", self.spaces["a"], "link", "set", "veth0", "netns", self.spaces["b"], "name", "cable-b")
        for name, address in (("a", "10.77.0.1/24"), ("b", "10.77.0.2/24")):
            ip("-n", self.spaces[name], "addr", "add", address, "dev", f"cable-{name}")
            ip("-n", self.spaces[name], "link", "set", "lo", "up")
            ip("-n", self.spaces[name], "link", "set", f"cable-{name}", "up")

    def connect(self, on: bool) -> None:
        """Plug the cable of `b` in, or pull it out."""
        ip("-n", self.spaces["b"], "link", "set", "cable-b", "up" if on else "down")

    def start(self, name: str, *flags: Any, before: str = "true", **variables: Any) -> None:
        """Give the command of a run on one host.

        Args:
            before: a shell command, for this host alone.
        """
        setup = f'mount --bind {self.folder / "hosts"} /etc/hosts; hostname host-{name}; {before}; exec "$@"'
        script = ["bash", ROOT / "scripts/run_multinode.sh", "supervised_finetuning.py"]
        command = ["ip", "netns", "exec", self.spaces[name], "unshare", "--mount", "--uts", "sh", "-c", setup, "sh"]
        own = {"HOSTS": 2, "MASTER": "host-a:29500", "NPROC": 1, "GLOO_SOCKET_IFNAME": f"cable-{name}"}
        own |= {"PYTHON": sys.executable, "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, **variables}
        with open(self.folder / f"log-{name}", "w") as log:
            self.running[name] = subprocess.Popen(
                [str(word) for word in (*command, *script, *flags)],
                env={**os.environ, **{key: str(value) for key, value in own.items()}},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"log-{name}").read_text()

    def wait(self) -> dict[str, int]:
        """Exit codes."""
        limit = time.monotonic() + SECONDS
        return {name: process.wait(max(limit - time.monotonic(), 1)) for name, process in self.running.items()}

    def wait_for(self, path: Path) -> None:
        limit = time.monotonic() + SECONDS
        while not path.exists():
            running = all(process.poll() is None for process in self.running.values())
            assert running and time.monotonic() < limit, self.log("a") + self.log("b")
            time.sleep(0.1)

    def close(self) -> None:
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_hosts(tmp_path):
    allowed = shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0
    if not allowed or subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not permitted here")
    both = TwoHosts(tmp_path)
    yield both
    both.close()


def flags_of(folder: Path) -> list[Any]:
    if not (folder / "model").exists():
        save_model(folder / "model", tiny_tokenizer())
        write_jsonl(
            folder / "data/rows.jsonl", [{"prompt": f"Q{n}?", "response": "x" * (1 + n % 23)} for n in range(64)]
        )
    return [
        *("--model_name_or_path", folder / "model", "--train_file_dir", folder / "data", "--resume", "auto"),
        *("--max_steps", 120, "--save_steps", 20, "--save_total_limit", 2, "--logging_steps", 10),
        *("--sample_prompts", 0, "--dataloader_pin_memory", "False", "--ddp_timeout", LIMIT),
    ]


@pytest.mark.slow
def test_a_cut_off_host_is_named_and_the_run_continues_when_it_is_back(two_hosts, tmp_path):
    """First without restarts, then the same command with them; the result is that of a run that was not cut off."""
    flags, out = flags_of(tmp_path), tmp_path / "out"
    for name in "ab":
        two_hosts.start(name, *flags, "--output_dir", out, MAX_RESTARTS=0)
    two_hosts.wait_for(out / "checkpoint-20/manifest.json")
    two_hosts.connect(False)
    cut = time.monotonic()
    assert two_hosts.wait() == {"a": STOPPED, "b": STOPPED}
    assert time.monotonic() - cut < 5 * LIMIT
    assert "error: host host-b (process 1 of 2) has not answered for" in two_hosts.log("a")
    assert "error: host host-b (process 1 of 2) has had no connection to host host-a" in two_hosts.log("b")
    assert "Traceback" not in two_hosts.log("a") + two_hosts.log("b")

    two_hosts.connect(True)
    for name in "ab":
        two_hosts.start(name, *flags, "--output_dir", out, MAX_RESTARTS=5)
    two_hosts.wait_for(out / "checkpoint-60/manifest.json")
    two_hosts.connect(False)
    limit = time.monotonic() + 5 * LIMIT
    while "has not answered" not in two_hosts.log("a"):
        assert time.monotonic() < limit
        time.sleep(0.5)
    two_hosts.connect(True)
    assert two_hosts.wait() == {"a": 0, "b": 0}
    assert two_hosts.log("a").count("resuming from") == 2
    assert "Traceback" not in two_hosts.log("a") + two_hosts.log("b")
    assert read_json(out / "run.json")["status"] == "finished"

    run_program("supervised_finetuning.py", *flags, "--output_dir", tmp_path / "whole", processes=2, timeout=900)
    whole, weights = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.items())


@pytest.mark.slow
def test_hosts_without_a_shared_folder_are_refused_and_with_one_train(two_hosts, tmp_path):
    """`b` has a disk of its own at the place of the output folder; without it the same command trains."""
    flags, disk = flags_of(tmp_path), tmp_path / "disk"
    disk.mkdir()
    for name, before in (("a", "true"), ("b", f"mount -t tmpfs none {disk}")):
        two_hosts.start(name, *flags, "--output_dir", disk / "out", before=before, MAX_RESTARTS=0)
    assert two_hosts.wait() == {"a": 1, "b": 1}
    assert two_hosts.log("a").count("of host-a is not the folder of that name on host-b. All hosts save") == 1
    assert "Traceback" not in two_hosts.log("a") + two_hosts.log("b")
    assert not list(disk.iterdir())
    for name in "ab":
        two_hosts.start(name, *flags, "--output_dir", disk / "out", "--max_steps", 20, MAX_RESTARTS=0)
    assert two_hosts.wait() == {"a": 0, "b": 0}


# -- quick -----------------------------------------------------------------------------------------------------------


def test_one_host_is_not_several(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert not has_several_hosts()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert has_several_hosts()


def test_a_folder_that_is_not_shared_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "has_several_hosts", lambda: True)
    require_shared_folder(tmp_path / "out")
    monkeypatch.setattr(hosts, "gather_object", lambda seen: [*seen, ("host-b", False), ("host-b", False)])
    with pytest.raises(UserError, match="is not the folder of that name on host-b. All hosts save"):
        require_shared_folder(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def watch(monkeypatch):
    """That of host 0 of two with four processes each, and a connection to its store for the other one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    gathered = iter([[(f"host-{n // 4}", n % 4) for n in range(8)]])
    monkeypatch.setattr(hosts, "gather_object", lambda value: next(gathered, value))
    ends = []
    watch = HostWatch(2.0, ends.append)
    watch.start()
    yield watch, store, ends
    watch.stop()


def test_a_host_without_heartbeats_is_named(watch):
    watching, store, ends = watch
    for beat in range(6):
        store.set(watching._keys[4], str(beat))
        time.sleep(0.5)
    assert not ends
    time.sleep(3.5)
    (message,) = ends
    assert message.startswith("host host-1 (processes 4 to 7 of 8) has not answered for ")
    assert "(--ddp_timeout 2), so host host-0 (processes 0 to 3 of 8) ends as well" in message


def test_a_host_that_has_finished_is_not_missed(watch):
    watching, store, ends = watch
    store.set(watching._keys[4], hosts.ENDED)
    time.sleep(4)
    assert not ends


def test_a_failed_meeting_says_where_and_what_to_do():
    args = Namespace(nnodes="2", rdzv_endpoint="node1:29500")
    assert launch.describe(RendezvousTimeoutError(), args).startswith("fewer than 2 hosts have come to node1:29500")
    reason = "The connection to the C10d store has failed."
    text = launch.describe(RendezvousConnectionError(reason), args)
    assert text.startswith("node1:29500 (--rdzv_endpoint) cannot be reached from this host") and reason in text


def test_the_same_command_is_given_to_torchrun_on_each_host(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/bash\necho "$*"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    script = ["bash", ROOT / "scripts/run_multinode.sh"]
    given = {**os.environ, "PYTHON": str(stand_in), "HOSTS": "2", "MASTER": "node1:29500", "NPROC": "8"}
    done = subprocess.run([*script, "dpo_training.py", "--x", "a b"], env=given, capture_output=True, text=True)
    assert done.stdout.split() == [
        *("-m", "medicalgpt.launch", "--nnodes", "2", "--nproc_per_node", "8", "--max_restarts", "3"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29500", "--rdzv_id", "medicalgpt"),
        *("--rdzv_conf", "join_timeout=600", "dpo_training.py", "--x", "a", "b"),
    ]
    for missing, words in (("HOSTS", ["a.py"]), ("MASTER", ["a.py"]), (None, [])):
        environment = {name: value for name, value in given.items() if name != missing}
        done = subprocess.run([*script, *words], env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and (missing or "no program given") in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(75, 0, True), (75, 19, True), (75, 20, False), (1, 0, False), (0, 0, False)]
)
def test_slurm_requeues_a_run_that_can_continue(tmp_path, code, restarts, requeued):
    """`srun` and `scontrol` are stand-ins: no Slurm was available."""
    stand_ins = {
        "srun": f'echo "$HOSTS $MASTER $JOB $*" >"{tmp_path}/srun.txt"; exit {code}',
        "scontrol": f'[ "$1" = requeue ] && echo "$2" >"{tmp_path}/requeued" || printf "node7\\nnode8\\n"',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_RESTART_COUNT": str(restarts)}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", ROOT / "scripts/run_slurm.sbatch", "dpo_training.py", "--resume", "auto"]
    assert subprocess.run(script, env=environment, capture_output=True).returncode == code
    words = (tmp_path / "srun.txt").read_text().split()
    assert words[:3] == ["2", "node7:29500", f"slurm-41-{restarts}"]
    assert words[-5:] == ["bash", "scripts/run_multinode.sh", "dpo_training.py", "--resume", "auto"]
    assert (tmp_path / "requeued").exists() == requeued
