"""A run that is asked to stop by a signal saves a checkpoint at the end of its step, and ends with a code of its own.

Before and after training there is nothing to wait for: the run ends at once. A second Ctrl-C always does.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from medicalgpt.errors import Stopped
from medicalgpt.logs import is_main_process

import torch
from transformers import TrainerCallback, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        received: the first such signal.
        installed: the handlers that this one has replaced, by signal.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._deferred = False
        self._process = os.getpid()
        self.installed: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals from here on, in the main thread; in another one Python does not allow it."""
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            # nohup ignores SIGHUP, and a shell SIGINT of its background jobs: that stays.
            if signal.getsignal(number) != signal.SIG_IGN:
                self.installed[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Handle the signals as before."""
        while self.installed:
            signal.signal(*self.installed.popitem())

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context a signal is only noted; whoever asks for it ends the run."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            self._handle_in_child(number)
            return
        if number == signal.SIGINT:
            # From here on the kernel ends the process, even in the middle of an operation on the GPU. A second Ctrl-C
            # reaches processes that torchrun has started as SIGTERM.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if not self._deferred:
            raise Stopped(f"{self.received.name}: nothing had to be saved")
        if is_main_process():
            hint = " Ctrl-C again ends it at once." if number == signal.SIGINT else ""
            # The log may be in use by what was interrupted.
            os.write(2, f"\n{self.received.name}: saves a checkpoint after this step, then stops.{hint}\n".encode())

    @staticmethod
    def _handle_in_child(number: int) -> None:
        """A worker process that was forked from this one: its parent ends it, also after a Ctrl-C that both get."""
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process of the run was asked to stop. Call it on every process."""
        asked = self.received is not None
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return asked
        flag = torch.tensor([int(asked)], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


class StopAfterStep(TrainerCallback):
    """Save a checkpoint and end the run after the step in which a process was asked to stop, or after its evaluation.

    Add it after `CheckpointCommitter`.

    Args:
        agreed: whether any process was asked to stop in the current step, before its optimizer's step; the same on
            every process.
        end: called on every process when the checkpoint is complete; does not return.
    """

    def __init__(self, request: StopRequest, agreed: Callable[[], bool], end: Callable[[], None]):
        self.request, self.agreed, self.end = request, agreed, end
        self.trains = self.stopping = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trains = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed():
            self.stopping = control.should_log = control.should_save = True
            # It may take longer than the process has. A resumed run makes it (see `DueEvaluation`).
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # Where an epoch ends before its last step is saved, as in PPO.
        if self.stopping:
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trains and state.global_step and not self.stopping and self.request.agreed(args.device):
            self.stopping = control.should_save = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping or self.request.agreed(args.device):
            self.end()

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trains = False
