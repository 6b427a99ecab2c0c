"""Kills and disk faults: no committed checkpoint is lost, none that is torn is loaded, a resume gives the same weights.

    python -m benchmarks.crash --kills 100 --faults 1000
    python -m benchmarks.crash --resume_points
    python -m benchmarks.crash --kills 20 --faults 40 --stages sft --output outputs/crash.json

Every stage is trained for a few steps on tiny models, with an adapter and with all weights, on one process and on two,
with a checkpoint in each step. Each run is a fork of a process that has imported the libraries.

`--kills` sends SIGKILL to a process of a run: half of the kills come at a random moment, half just before a randomly
chosen change of the disk (a file opened for writing, a rename, a removal, a new folder). The command is then given
again, and killed again, and so on; the last one is left to finish.

`--faults` makes one system call of a save fail, with `strace -e inject`: of every write, open, rename, fsync, mkdir,
unlink and truncate of a file of the run, in a save in the middle, in one that removes the checkpoint before it, and in
the final one, each with SIGKILL, with ENOSPC (the disk is full) and with EIO. The process is forked where the save
begins, once per fault.

After each kill and each fault:

- the newest checkpoint that was committed before is still complete, or a newer one is;
- every checkpoint that counts as complete has the bytes of that of a run without an interruption: weights, optimizer,
  scheduler, and random state. One that was saved in part cannot;
- a save that reports success is complete;
- the command, given again, ends with those bytes too, and with the same losses and the same rows in the same order.
  After a fault this is done once for all faults that left the same files, complete, torn, empty or missing.

`--resume_points` trains 24 steps with a checkpoint in each, resumes from each of the 24, and compares likewise.

The exit code is 1 if anything of this does not hold.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import crash_faults, crash_runs
from benchmarks.crash_runs import OUT, Case
from benchmarks.peers import describe_machine

# With checkpoints in the second epoch on two processes, which train the rows in five steps.
STEPS = 6
LONGEST_CHAIN = 8
WEIGHTS = {"lora": False, "full": True}
PROCESSES = {"1": 1, "2": 2}
RESUME_STEPS = 24


class Bench:
    """Where the runs are, what was counted, and what failed."""

    def __init__(self, work: Path, seed: int, seconds: float, progress_every: int = 20):
        self.work, self.random, self.every = work, random.Random(seed), progress_every
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.failures: list[str] = []
        self._references: dict[tuple[Case, int], Path] = {}
        self._seconds: dict[tuple[Case, int], float] = {}
        self._limit = time.monotonic() + seconds
        self._number = 0

    def new_folder(self) -> Path:
        """A folder for a run."""
        self._number += 1
        return self.work / f"run-{self._number}"

    def count(self, *what: str) -> None:
        """Count a kill, a fault or a resume point, and report progress."""
        self.counts[what] += 1
        if sum(self.counts.values()) % self.every == 0:
            print(f"{sum(self.counts.values())}: {len(self.failures)} failures, {time.strftime('%X')}", flush=True)

    def fail(self, case: Case, what: str, folder: Path | None = None) -> None:
        """Note a failure, with the end of the log."""
        log = f"\n{crash_runs.tail_of_logs(folder)}" if folder else ""
        self.failures.append(f"{case}: {what}{log}")
        print(f"FAILURE {self.failures[-1]}", flush=True)

    def reference(self, case: Case, steps: int) -> Path:
        """The run without an interruption, with a checkpoint of each step.

        Raises:
            SystemExit: it failed, so that nothing can be compared with it.
        """
        if (case, steps) not in self._references:
            folder = self.new_folder()
            job = crash_runs.start(case, folder, crash_runs.flags_of(case, self.work, steps), count_changes)
            if any(job.wait()):
                sys.exit(f"{case} fails without a fault:\n{crash_runs.tail_of_logs(folder)}")
            self._references[case, steps] = folder
            self._seconds[case, steps] = time.monotonic() - job.started
        return self._references[case, steps]

    def length_of(self, case: Case, steps: int) -> tuple[float, int]:
        """Seconds of the run without an interruption, and how often its first process changes the disk."""
        changes = (self.reference(case, steps) / "changes").stat().st_size
        return self._seconds[case, steps], changes

    def has_time(self) -> bool:
        """Whether `--seconds` are not over."""
        return time.monotonic() < self._limit

    def problem_of(self, case: Case, folder: Path, steps: int, committed: int) -> str | None:
        """What is wrong with the checkpoints in a folder, or None.

        Args:
            committed: the newest step whose checkpoint was committed.
        """
        found = crash_runs.committed_in(folder)
        if max(found, default=0) < committed:
            return f"lost: the checkpoint of step {committed} was committed, the newest complete one is {list(found)}"
        for step, path in found.items():
            wanted = crash_runs.digests(self.reference(case, steps) / OUT / f"checkpoint-{step}")
            if differing := differing_names(crash_runs.digests(path), wanted):
                return f"torn: checkpoint-{step} counts as complete, but differs in {differing}"
        return None

    def difference(self, case: Case, folder: Path, steps: int, first: int = 0) -> str | None:
        """How a run that has ended differs from the one without an interruption, or None.

        Args:
            first: the first step whose rows this run has written down.
        """
        reference = self.reference(case, steps)
        wanted = {name: value for name, value in crash_runs.digests(reference / OUT).items() if _is_last(name, steps)}
        found = {name: value for name, value in crash_runs.digests(folder / OUT).items() if _is_last(name, steps)}
        if differing := differing_names(found, wanted):
            return f"other bytes in {differing}"
        if crash_runs.losses(folder) != crash_runs.losses(reference):
            return "other losses"
        rows = crash_runs.rows_by_step(folder)
        for name, by_step in crash_runs.rows_by_step(reference).items():
            if wanted_rows := {step: found for step, found in by_step.items() if step >= first}:
                if rows.get(name) != wanted_rows:
                    return f"other rows, or in another order ({name})"
        return None


def _is_last(name: str, steps: int) -> bool:
    """Whether a file is of the result or of the last checkpoint."""
    return not name.startswith("checkpoint-") or name.startswith(f"checkpoint-{steps}/")


def differing_names(found: dict[str, str], wanted: dict[str, str]) -> str:
    """Names whose values differ, or that only one of the two has; empty if there are none."""
    return ", ".join(name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name))


# -- kills -----------------------------------------------------------------------------------------------------------


def kill_often(bench: Bench, cases: list[Case], kills: int) -> None:
    """Kill runs of these cases in turn, until there were so many kills."""
    done = 0
    while done < kills and bench.has_time():
        for case in cases:
            done += kill_one_run(bench, case, min(LONGEST_CHAIN, kills - done))
            if done >= kills or not bench.has_time():
                break


def kill_one_run(bench: Bench, case: Case, kills: int) -> int:
    """Start a run, kill it, give its command again, at most `kills` times, and then let it finish.

    Returns:
        How often it was killed.
    """
    draw, folder = bench.random, bench.new_folder()
    seconds, changes = bench.length_of(case, STEPS)
    flags = crash_runs.flags_of(case, bench.work, STEPS, limit=draw.choice((1, 1, 2, None)))
    committed = killed = 0
    while True:
        by_moment = draw.random() < 0.5
        moment, change = draw.uniform(0, seconds), draw.randrange(changes)
        last = killed == kills
        inside = (lambda: None) if last or by_moment else (lambda change=change: die_at_change(change))
        job = crash_runs.start(case, folder, flags, inside)
        if by_moment and not last:
            wait_until(job, moment)
        codes = job.wait()
        if not any(codes):
            break
        if -9 not in codes:
            bench.fail(case, f"after {killed} kill(s) the command failed with {codes}", folder)
            return killed
        killed += 1
        bench.count("kill", case.stage, "at a random moment" if by_moment else "before a change of the disk")
        committed = max(committed, crash_runs.journal(folder))
        if problem := bench.problem_of(case, folder, STEPS, committed):
            bench.fail(case, problem, folder)
            return killed
    if difference := bench.difference(case, folder, STEPS):
        bench.fail(case, f"after {killed} kill(s): {difference}", folder)
    shutil.rmtree(folder)
    return killed


def wait_until(job: crash_runs.Job, moment: float) -> None:
    """Kill a job at this many seconds, if it lasts that long."""
    while not job.poll():
        if time.monotonic() - job.started >= moment:
            job.kill()
        time.sleep(0.002)


def count_changes() -> None:
    """Have this process write a byte to `changes` for each change of the disk, if it is the first."""
    if os.environ.get("RANK", "0") == "0":
        target = os.open("changes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        crash_faults.on_change(lambda: os.write(target, b"."))


def die_at_change(number: int) -> None:
    """Have this process, if it is the first, kill itself just before its nth change of the disk."""
    if os.environ.get("RANK", "0") == "0":
        left = [number]

        def changed() -> None:
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1

        crash_faults.on_change(changed)


# -- faults ----------------------------------------------------------------------------------------------------------


def inject_faults(bench: Bench, cases: list[Case], saves: list[str], faults: int) -> None:
    """Let system calls of saves fail, spread over these cases and their saves, until there were so many faults."""
    cases = [case for case in cases if case.processes == 1]
    order = [(case, save) for save in saves for case in cases]
    bench.random.shuffle(order)
    for number, (case, save) in enumerate(order):
        left = faults - sum(count for what, count in bench.counts.items() if what[0] == "fault")
        if bench.has_time():
            inject_into_save(bench, case, save, -(-left // (len(order) - number)))


def inject_into_save(bench: Bench, case: Case, save: str, faults: int) -> None:
    """Let up to this many system calls of one save fail, one at a time."""
    restarted: dict[Any, str | None] = {}
    flags = crash_runs.flags_of(case, bench.work, STEPS, limit=1)
    with crash_faults.Template(case, flags, bench.new_folder(), crash_faults.SAVES[save]) as template:
        found = template.faults()
        for fault in bench.random.sample(found, min(faults, len(found))):
            folder = bench.new_folder()
            if not bench.has_time():
                return
            outcome = template.inject(fault, folder)
            if not outcome.injected:
                shutil.rmtree(folder)
                continue
            bench.count("fault", case.stage, fault.kind, fault.call, outcome.end)
            problem = bench.problem_of(case, folder, STEPS, max(template.committed, crash_runs.journal(folder)))
            if not problem and outcome.end == "success" and crash_runs.journal(folder) <= template.committed:
                problem = "the save reports success, but its checkpoint is not complete" if save != "final" else None
            if not problem:
                state = template.state_of(folder)
                if state not in restarted:
                    restarted[state] = restart(bench, case, folder, flags)
                    bench.count("restart after a fault", case.stage)
                problem = restarted[state]
            if problem:
                bench.fail(case, f"{fault} in the {save} save ({outcome.end}): {problem}", folder)
            shutil.rmtree(folder)


def restart(bench: Bench, case: Case, folder: Path, flags: list[str]) -> str | None:
    """Give the command again; returns what is wrong with the result, or None."""
    again = bench.new_folder()
    crash_runs.copy_run(folder, again)
    codes = crash_runs.start(case, again, flags).wait()
    if any(codes):
        return f"the command given again failed with {codes}\n{crash_runs.tail_of_logs(again)}"
    difference = bench.difference(case, again, STEPS)
    shutil.rmtree(again)
    return difference


# -- resume points ---------------------------------------------------------------------------------------------------


def resume_everywhere(bench: Bench, cases: list[Case]) -> None:
    """Resume from each checkpoint of each case."""
    for case in cases:
        if not bench.has_time():
            return
        whole = bench.reference(case, RESUME_STEPS)
        flags = crash_runs.flags_of(case, bench.work, RESUME_STEPS)
        at = flags.index("--resume")
        for step in range(1, RESUME_STEPS + 1):
            folder = bench.new_folder()
            ignored = [f"checkpoint-{later}" for later in range(1, RESUME_STEPS + 1) if later != step]
            shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*ignored, "rows.*", "log*"))
            # The copy is of a run that has finished, which `--resume auto` would leave alone.
            from_step = [*flags[:at], "--resume_from_checkpoint", f"{OUT}/checkpoint-{step}", *flags[at + 2 :]]
            codes = crash_runs.start(case, folder, from_step).wait()
            bench.count("resume point", case.stage, "full" if case.full else "LoRA", f"{case.processes} process(es)")
            if any(codes):
                bench.fail(case, f"the resume from step {step} failed with {codes}", folder)
            elif difference := bench.difference(case, folder, RESUME_STEPS, first=step):
                bench.fail(case, f"resumed from step {step}: {difference}", folder)
            shutil.rmtree(folder)


# -- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Do what the flags say, and print the counts."""
    args = parse_args()
    before, started = describe_machine(), time.time()
    cases = [
        Case(stage, WEIGHTS[weights], PROCESSES[processes])
        for processes in args.processes
        for weights in args.weights
        for stage in args.stages
    ]
    with work_folder(args.work) as work:
        crash_runs.load(args.stages, work)
        bench = Bench(work, args.seed, args.seconds)
        if args.kills:
            kill_often(bench, cases, args.kills)
        if args.faults:
            inject_faults(bench, cases, args.saves, args.faults)
        if args.resume_points:
            resume_everywhere(bench, cases)
    counts = [[*what, count] for what, count in sorted(bench.counts.items())]
    summary = {"seconds": round(time.time() - started), "counts": counts, "failures": bench.failures}
    report(bench)
    print(f"{summary['seconds']} s, seed {args.seed}")
    if args.output:
        args.output.write_text(json.dumps(before | {"seed": args.seed} | summary, indent=1), encoding="utf-8")
    sys.exit(1 if bench.failures else 0)


@contextmanager
def work_folder(parent: Path | None) -> Iterator[Path]:
    """A folder in memory, if there is one, or below `parent`; removed at the end."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=parent or (memory if memory.is_dir() else None)) as name:
        yield Path(name)


def report(bench: Bench) -> None:
    """Print how often each thing was done, and how it ended."""
    groups: dict[str, Counter[str]] = {}
    for what, count in bench.counts.items():
        groups.setdefault(what[0], Counter())["in all"] += count
        for detail in what[1:]:
            groups[what[0]][detail] += count
    for name, counts in groups.items():
        print(f"{name}: " + ", ".join(f"{detail} {count:,}" for detail, count in counts.items()))
    print(f"failures: {len(bench.failures)}")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=0, help="how many times to kill a run")
    parser.add_argument("--faults", type=int, default=0, help="how many system calls to let fail; needs strace")
    parser.add_argument("--resume_points", action="store_true", help="resume from each of 24 steps of each case")
    parser.add_argument("--stages", type=some_of(crash_runs.STAGES), default=list(crash_runs.STAGES))
    parser.add_argument("--weights", type=some_of(WEIGHTS), default=list(WEIGHTS), help="what is trained")
    parser.add_argument("--processes", type=some_of(PROCESSES), default=list(PROCESSES))
    parser.add_argument("--saves", type=some_of(crash_faults.SAVES), default=list(crash_faults.SAVES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments and faults that are chosen")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing more after this time")
    parser.add_argument("--work", type=Path, help="a folder for the runs; default: in memory")
    parser.add_argument("--output", type=Path, help="counts and failures as JSON")
    return parser.parse_args()


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of these names, separated by commas."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    return names


if __name__ == "__main__":
    main()
