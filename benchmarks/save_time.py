"""How long a checkpoint of all weights takes: as it is saved now, and with torch's asynchronous saving (DCP).

    python -m benchmarks.save_time
    python -m benchmarks.save_time --layers 4 --work_dir /data/tmp

A Qwen3 with about 200 million weights in float32 and the state of AdamW. Prints a table: the seconds that training
waits, those until all is on the disk, with its hashes, and the bytes. `saved by the trainer` is safetensors and
torch.save, as transformers writes them; `hashes and sync` is what the manifest adds; `DCP, asynchronous` copies the
state, and writes it in a thread while training continues.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from medicalgpt.files import hash_file

import torch
import torch.distributed.checkpoint as dcp
from transformers import Qwen3Config, Qwen3ForCausalLM


def build(layers: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that has taken a step."""
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save_as_trainer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What transformers' trainer writes for one process."""
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def hash_and_sync(folder: Path) -> None:
    """What a manifest needs: every file on the disk, and its hash."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            hash_file(path)


def timed(action: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and the result."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14, help="14 give about 200 million weights")
    parser.add_argument("--work_dir", help="folder for the checkpoints; default: that of the system")
    arguments = parser.parse_args()
    model, optimizer = build(arguments.layers)
    count = sum(parameter.numel() for parameter in model.parameters())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    print(f"{count:,} weights in {next(model.parameters()).dtype}, load {os.getloadavg()[0]:.1f}")
    print("| way | training waits s | complete s | MB |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as place:
        folder = Path(place) / "checkpoint"

        def row(way: str, waits: float, complete: float) -> None:
            print(f"| {way} | {waits:.2f} | {complete:.2f} | {size_of(folder) / 1e6:,.0f} |", flush=True)

        saved, _ = timed(lambda: save_as_trainer(model, optimizer, folder))
        row("saved by the trainer", saved, saved)
        checked, _ = timed(lambda: hash_and_sync(folder))
        row("with hashes and sync", saved + checked, saved + checked)
        shutil.rmtree(folder)
        saved, _ = timed(lambda: dcp.save(state, checkpoint_id=folder, no_dist=True))
        checked, _ = timed(lambda: hash_and_sync(folder))
        row("DCP, with hashes and sync", saved + checked, saved + checked)
        shutil.rmtree(folder)
        waits, future = timed(lambda: dcp.async_save(state, checkpoint_id=folder, no_dist=True))
        written, _ = timed(lambda: future.result())
        checked, _ = timed(lambda: hash_and_sync(folder))
        row("DCP, asynchronous, with hashes and sync", waits, waits + written + checked)


if __name__ == "__main__":
    main()
