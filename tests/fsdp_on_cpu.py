"""Run a stage under FSDP2 on processes without a GPU: torchrun -m tests.fsdp_on_cpu STAGE.py FLAGS.

accelerate takes FSDP for plain data parallelism on CPUs: `AcceleratorState` looks at its settings only where the
processes have a GPU or a like device, and no setting changes that. PyTorch's `fully_shard` itself works over gloo. So
that the rest of the way is the real one (transformers' trainer, accelerate's preparation of the model, torch's sharding
and checkpoints), this module makes `AcceleratorState` take the branch that it takes on GPUs. This is for tests: users
get a refusal on CPUs. The settings are those of fsdp2.yaml, read by accelerate's own launcher.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parent.parent


def launch_environment(config: Path, script: str = "script.py") -> dict[str, str]:
    """The variables that `accelerate launch --config_file` sets for FSDP."""
    before = dict(os.environ)
    try:
        args, _, _ = _validate_launch_command(
            launch_command_parser().parse_args(["--config_file", str(config), script])
        )
        changed = prepare_multi_gpu_env(args)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {name: value for name, value in changed.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def take_fsdp_on_cpus() -> None:
    """Let `AcceleratorState` do on processes with CPUs what it does on processes with GPUs."""
    initialize = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def use_fsdp2(config: Path = ROOT / "fsdp2.yaml") -> None:
    """Train under FSDP2 in this process, with the settings of a file for `accelerate launch`."""
    os.environ.update(launch_environment(config))
    take_fsdp_on_cpus()


if __name__ == "__main__":
    use_fsdp2()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
