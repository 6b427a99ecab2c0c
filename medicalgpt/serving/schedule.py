"""Who is answered next: fair shares of the batch and of the queue among clients.

Each place that becomes free goes to the client with the fewest running answers, and to the one that has waited longest
among its requests. When every place is taken, a running answer gives its place up to a waiting one

- if its client has at least two more running answers than the client that waits (max-min fairness), or
- if it is much longer already: answers are in level 0 up to 256 tokens, and one level up with each doubling, so that a
  short answer does not wait for the end of long ones (a multilevel feedback queue, https://doi.org/10.1145/1460833.1460871).

It continues later, with all of its tokens. When the queue is full, the client with the most places gives one up
(longest queue drop), so that one client can use everything while it is alone, and nobody can keep others out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from medicalgpt.serving.generation import Answer, AnswerState, GenerationRequest

# Tokens of an answer in the lowest level.
SHORT_ANSWER = 256
# Tokens that an answer gets before it can be suspended again: to continue it, its prompt is computed again.
MIN_TOKENS_IN_BATCH = 16


class QueueFullError(RuntimeError):
    """The queue is full.

    Attributes:
        waiting: number of queued requests.
        crowding: whether others wait, and most of the places are the client's.
    """

    def __init__(self, waiting: int, crowding: bool = False):
        super().__init__(
            "The queue is full, others wait, and you have most of its places. Ask for fewer answers at a time."
            if crowding
            else f"{waiting} requests wait already. Try again in a moment."
        )
        self.waiting, self.crowding = waiting, crowding


@dataclass(eq=False)
class Job:
    """A request on its way to its answer.

    Attributes:
        state: the answer as far as it is generated; None before its first token.
        joined_at: number of tokens that the answer had when it joined the batch the last time.
        leaving: the answer is about to be suspended.
    """

    request: GenerationRequest
    future: "Future[Answer]"
    state: AnswerState | None = None
    joined_at: int = 0
    leaving: bool = False

    @property
    def client(self) -> str:
        return self.request.client

    @property
    def tokens(self) -> int:
        return len(self.state.token_ids) if self.state else 0

    @property
    def level(self) -> int:
        return (self.tokens // SHORT_ANSWER).bit_length()


class Schedule:
    """The running and the waiting requests of a batcher, which calls it under its lock.

    Attributes:
        running: jobs in the batch.
        waiting: queued jobs, the one that waits longest first.
    """

    def __init__(self, max_running: int, max_waiting: int):
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running: list[Job] = []
        self.waiting: list[Job] = []

    def forget_ended(self) -> None:
        """Drop waiting jobs that nobody waits for."""
        self.waiting = [job for job in self.waiting if not job.future.done()]

    def add(self, jobs: Sequence[Job]) -> list[Job]:
        """Queue jobs of one client, all of them or none.

        Returns:
            Jobs of clients with more places, which have been dropped for them.

        Raises:
            QueueFullError: no client has so many places that it should give them up.
        """
        self.forget_ended()
        places = Counter(job.client for job in (*self.running, *self.waiting))
        missing = len(jobs) + len(self.waiting) - self.max_waiting - max(0, self.max_running - len(self.running))
        own = places[jobs[0].client] + len(jobs)
        dropped: list[Job] = []
        while missing > len(dropped):
            # An answer that has begun is not dropped.
            untouched = [job for job in self.waiting if job.state is None and job not in dropped]
            largest = max(untouched, key=lambda job: places[job.client], default=None)
            if largest is None or places[largest.client] <= own or largest.client == jobs[0].client:
                raise QueueFullError(len(self.waiting))
            dropped.append([job for job in untouched if job.client == largest.client][-1])
            places[largest.client] -= 1
        self.waiting = [job for job in self.waiting if job not in dropped] + list(jobs)
        return dropped

    def take_next(self, may_run: Callable[[Job], bool] = lambda job: True) -> Job | None:
        """Move the job that is next from the queue into the batch; None if there is no room or no job."""
        if len(self.running) >= self.max_running or (job := self._next(may_run)) is None:
            return None
        self.waiting.remove(job)
        self.running.append(job)
        job.joined_at = job.tokens
        return job

    def suspend(self, job: Job) -> None:
        """Move a job from the batch to the end of the queue."""
        self.running.remove(job)
        self.waiting.append(job)
        job.leaving = False

    def to_suspend(self) -> Job | None:
        """The running job that should leave the batch now, if any."""
        staying = [job for job in self.running if not job.leaving]
        if len(staying) < self.max_running or (following := self._next()) is None:
            return None
        counts = Counter(job.client for job in staying)
        own = counts[following.client]
        ready = [job for job in staying if job.tokens - job.joined_at >= MIN_TOKENS_IN_BATCH]
        # The shortest of the client that has most: it is computed again in the least time.
        greedy = [job for job in ready if counts[job.client] > own + 1]
        if greedy:
            return min(greedy, key=lambda job: (-counts[job.client], job.tokens))
        longer = [job for job in ready if job.level > following.level and counts[job.client] >= own]
        return max(longer, key=lambda job: job.tokens, default=None)

    def _next(self, may_run: Callable[[Job], bool] = lambda job: True) -> Job | None:
        self.forget_ended()
        counts = Counter(job.client for job in self.running if not job.leaving)
        # The first of several that are equal has waited longest.
        return min(filter(may_run, self.waiting), key=lambda job: counts[job.client], default=None)
