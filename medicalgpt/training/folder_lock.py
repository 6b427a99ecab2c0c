"""One program at a time writes into an output folder: a lock that names its owner, and is taken over from a dead one.

The lock is one of the kernel (`fcntl.lockf`, which NFS passes on to its server) on a small file that says who holds
it. The kernel drops it when the owner ends, however that happens. Where the file system has no such locks, the number
and the start time of the owner's process decide.
"""

import atexit
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from medicalgpt.errors import UserError

from loguru import logger

LOCK_FILE = ".run.lock"
# By which a scheduler numbers the attempts of a job, of which the earlier ones have ended when a later one starts.
ATTEMPTS = (("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"))
# torchrun's, if the user has given none: all jobs have the same.
NO_JOB = ("", "none")
SECONDS_TO_SETTLE = 0.5
TAKEN = (errno.EACCES, errno.EAGAIN)


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None if there is no such process.

    A number is used again for another process; together with its start it is not.
    """
    try:
        # The name of the program, in parentheses, can contain spaces.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _attempts() -> dict[str, int]:
    """Attempt by job, for each scheduler that this process was started by."""
    attempts = {}
    for job, count in ATTEMPTS:
        if (name := os.environ.get(job, "")) not in NO_JOB:
            number = os.environ.get(count, "0")
            attempts[f"{job}={name}"] = int(number) if number.isdecimal() else 0
    return attempts


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        boot: the machine since it was last started; empty if it does not tell.
        process_start: see the function of this name.
        token: of the lock, so that no other one of this process is taken for it.
    """

    host: str = field(default_factory=socket.gethostname)
    boot: str = field(default_factory=_boot)
    pid: int = field(default_factory=os.getpid)
    process_start: str | None = field(default_factory=lambda: process_start(os.getpid()))
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    command: str = field(default_factory=lambda: shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500])
    attempts: dict[str, int] = field(default_factory=_attempts)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def parse(cls, text: bytes) -> "Owner | None":
        """The owner that a lock file names; None if it names none."""
        try:
            values = json.loads(text)
            owner = cls(**{entry.name: values[entry.name] for entry in fields(cls)})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return owner if isinstance(owner.pid, int) and isinstance(owner.attempts, dict) else None

    def is_this_process(self) -> bool:
        return (self.host, self.pid, self.process_start) == (
            socket.gethostname(),
            os.getpid(),
            process_start(os.getpid()),
        )

    def is_earlier_attempt(self) -> bool:
        """Whether it is an earlier attempt of the job that this process belongs to."""
        now = _attempts()
        return any(now.get(job, attempt) > attempt for job, attempt in self.attempts.items())

    def has_ended(self, kernel_locks: bool) -> bool:
        """Whether its process has ended, as far as this machine can tell.

        Args:
            kernel_locks: the lock of the kernel was free, so no process of this machine holds it.
        """
        if self.is_earlier_attempt():
            return True
        if self.host != socket.gethostname():
            return False
        return kernel_locks or (self.boot == _boot() and process_start(self.pid) != self.process_start)


def _read(file: int) -> Owner | None:
    return Owner.parse(os.pread(file, 100_000, 0))


class FolderLock:
    """The right to write into a folder.

    Taking it again in the process that holds it succeeds. It is released when the process ends.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self._file: int | None = None
        self._owner: Owner | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock, from an owner that has ended with a notice.

        Raises:
            OSError: the folder cannot be written to.
            UserError: another process holds it, or one of another machine that may be running.
        """
        folder = self.path.parent
        self._made += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if self._lock(file):
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)
        atexit.register(self.release)

    def _lock(self, file: int) -> bool:
        """Whether the open lock file now belongs to this process; False if another one has removed it meanwhile."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kernel_locks = True
        except OSError as error:
            if error.errno in TAKEN:
                raise self._refusal(_read(file), running=True) from error
            kernel_locks = False
        try:
            if not os.path.samestat(os.fstat(file), os.stat(self.path)):
                return False
        except FileNotFoundError:
            return False
        earlier = _read(file)
        if earlier and not earlier.is_this_process():
            if not earlier.has_ended(kernel_locks):
                raise self._refusal(earlier)
            logger.warning(f"{earlier}, has ended without leaving {self.path.parent}, which this run takes over")
        self._owner = Owner()
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(self._owner)).encode(), 0)
        if not kernel_locks:
            # Of several that found it free, the last to write has it.
            time.sleep(SECONDS_TO_SETTLE)
            if (owner := _read(file)) and owner.token != self._owner.token:
                raise self._refusal(owner, running=True)
        return True

    def _refusal(self, owner: Owner | None, running: bool = False) -> UserError:
        folder = self.path.parent
        if running or (owner and owner.host == socket.gethostname()):
            return UserError(
                f"{folder} is in use by {owner or 'another process'}{f': {owner.command}' if owner else ''}\n"
                "Wait for it, stop it, or choose another --output_dir."
            )
        return UserError(
            f"{folder} was last written by {owner}: {owner.command}\n"
            "This machine cannot see whether it is still running. If it has ended, remove its lock: "
            f"rm {shlex.quote(str(self.path))}\nOtherwise wait for it, stop it, or choose another --output_dir."
        )

    def release(self) -> None:
        """Give up the lock, if this process holds it. A folder that was made for it alone is removed."""
        atexit.unregister(self.release)
        file, owner, self._file, self._owner = self._file, self._owner, None, None
        if file is None:
            return
        # A forked process inherits the object, but not the lock.
        if owner.pid == os.getpid() and (held := _read(file)) and held.token == owner.token:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):
                for path in self._made:
                    path.rmdir()
        os.close(file)

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
