"""Several hosts: they share the output folder, and one that is cut off is named instead of being waited for.

If a cable or a switch fails, no connection is closed: a collective operation waits, with NCCL until its watchdog aborts
the process, with gloo for as long as the kernel sends again. So the first process of each host writes a heartbeat to
the store of the process group, in a thread and over its own connection, and every process looks at those of the other
hosts: if one alone ended, its launcher would wait for the others, which are in a collective operation.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from medicalgpt.errors import STOPPED, UserError
from medicalgpt.logs import is_main_process, local_rank, local_world_size, rank, world_size

import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object

SECONDS_BETWEEN_BEATS = 5.0
ENDED = "ended"
# How long a network file system may show another host an old list of files.
SECONDS_TO_APPEAR = 60.0


def has_several_hosts() -> bool:
    """Whether the processes of this run are on more than one machine, as the launcher says."""
    return local_world_size(world_size()) < world_size()


def require_shared_folder(folder: Path) -> None:
    """Refuse an output folder that not all hosts share. Call it on every process.

    Each process writes its part of a checkpoint there (its random state; with ZeRO its shard of the optimizer), and
    reads it there when it resumes. In folders of their own these parts would never be together.

    Raises:
        UserError: on every process.
    """
    if not has_several_hosts():
        return
    token = [uuid.uuid4().hex if is_main_process() else ""]
    broadcast_object_list(token)
    mark = folder / f".shared-{token[0]}"
    problem: list[str | None] = [None]
    if is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(f"--output_dir {folder} cannot be written to: {problem[0]}. Choose another folder.")
    seen = gather_object([(socket.gethostname(), _appears(mark))])
    mark.unlink(missing_ok=True)
    if blind := list(dict.fromkeys(host for host, is_seen in seen if not is_seen)):
        raise UserError(
            f"--output_dir {folder} of {seen[0][0]} is not the folder of that name on {', '.join(blind)}. All hosts "
            "save a checkpoint together, so they need one folder: choose one on a disk that all of them share (NFS, "
            f"Lustre), or mount that of {seen[0][0]} on the others (for example with sshfs)."
        )


def _appears(path: Path) -> bool:
    limit = time.monotonic() + (SECONDS_TO_APPEAR if path.parent.is_dir() and _is_network_disk(path.parent) else 0)
    while not path.exists():
        if time.monotonic() > limit:
            return False
        # A network file system looks again when the folder is listed.
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.5)
    return True


def _is_network_disk(folder: Path) -> bool:
    """Whether a folder is on a disk of another machine, as far as the name of its file system tells."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return True
    inside = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    kind = max(inside, key=lambda mount: len(mount[0]), default=("", ""))[1]
    return kind.startswith(
        ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse", "9p", "glusterfs", "wekafs")
    )


class HostWatch:
    """Heartbeats of the hosts of a run. Without an answer for the time limit, the processes end and say which host.

    Args:
        limit: seconds (`--ddp_timeout`).
        end: called with the message, in the thread.
    """

    def __init__(self, limit: float, end: Callable[[str], None] | None = None):
        self.limit, self._end = limit, end or _end_process
        self._done = threading.Event()
        self._beating: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch. Call it on every process, with the process group initialized."""
        found = gather_object([(socket.gethostname(), local_rank())])
        token = [uuid.uuid4().hex if is_main_process() else ""]
        broadcast_object_list(token)
        # By the rank of the first process of each host.
        self.hosts = {number: host for number, (host, local) in enumerate(found) if local == 0}
        self._keys = {number: f"heartbeat/{token[0]}/{number}" for number in self.hosts}
        self._last = [*sorted(self.hosts), len(found)]
        self._store = _connect(self.limit)
        self._first = rank() - local_rank()
        if local_rank() == 0:
            self._store.set(self._keys[rank()], "0")
        gather_object([None])
        if others := [number for number in self.hosts if number != self._first]:
            self._answered = time.monotonic()
            self._seen = {number: (b"", self._answered) for number in others}
            # Questions to a store on a host that is cut off can wait for ever, so another thread looks at the clock.
            threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
            for thread in threads:
                thread.start()
            self._beating = threads[0]

    def stop(self) -> None:
        """The run has ended: this host will not answer any more, and need not."""
        self._done.set()
        if self._beating:
            self._beating.join(timeout=2 * SECONDS_BETWEEN_BEATS)

    def _beat(self) -> None:
        """Write this host's heartbeat, and read those of the others, until the run ends or the connection breaks."""
        beats = 0
        with suppress(dist.DistError, RuntimeError):
            while not self._done.wait(min(SECONDS_BETWEEN_BEATS, self.limit / 4)):
                beats += 1
                if local_rank() == 0:
                    self._store.set(self._keys[rank()], str(beats))
                values = self._store.multi_get([self._keys[number] for number in self._seen])
                self._answered = time.monotonic()
                for number, value in zip(list(self._seen), values, strict=True):
                    if value != self._seen[number][0]:
                        self._seen[number] = (value, self._answered)
            if local_rank() == 0:
                self._store.set(self._keys[rank()], ENDED)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.limit / 4)):
            silence = time.monotonic() - self._answered
            if silence > self.limit:
                self._end(self._unreachable(silence))
                return
            silences = {
                number: self._answered - when for number, (value, when) in self._seen.items() if value != ENDED.encode()
            }
            if missing := [number for number, seconds in silences.items() if seconds > self.limit]:
                self._end(self._silent(missing, max(silences[number] for number in missing)))
                return

    def _name(self, number: int) -> str:
        """`host b (processes 8 to 15 of 16)`."""
        end = self._last[self._last.index(number) + 1] - 1
        which = f"process {number}" if end == number else f"processes {number} to {end}"
        return f"host {self.hosts[number]} ({which} of {self._last[-1]})"

    def _silent(self, missing: list[int], seconds: float) -> str:
        names, own = ", ".join(self._name(number) for number in missing), self._name(self._first)
        return (
            f"{names} has not answered for {seconds:.0f} s {self._flag()}, so {own} ends as well.\n"
            "  Its machine, its network or its program has failed; look there, then give the same command again on "
            "each host.\n  With --resume auto the run continues from its last complete checkpoint."
        )

    def _unreachable(self, seconds: float) -> str:
        own, store = self._name(self._first), self._name(min(self.hosts))
        return (
            f"{own} has had no connection to {store} for {seconds:.0f} s {self._flag()} and ends.\n"
            "  The network of one of the two, or the other machine, has failed; when it is back, give the same command "
            "again on each host.\n  With --resume auto the run continues from its last complete checkpoint."
        )

    def _flag(self) -> str:
        return f"(--ddp_timeout {self.limit:.0f})"


def watch_hosts(limit: float) -> HostWatch:
    """Begin to watch the hosts of this run, if there are several. Call it on every process; see `HostWatch`."""
    watch = HostWatch(limit)
    if has_several_hosts():
        watch.start()
    return watch


def _connect(limit: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=limit))


def _end_process(message: str) -> None:
    if local_rank() == 0:
        print(f"\nerror: {message}", file=sys.stderr, flush=True)
    # The main thread may wait for the lost host and cannot be interrupted there.
    os._exit(STOPPED)
