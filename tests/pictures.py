"""Images, rows about them, and a model that has learned their colours."""

import struct
import zlib
from pathlib import Path
from typing import Any

from tests.helpers import open_stage, write_jsonl
from tests.towers import make_seeing

from PIL import Image

ANSWER = {"role": "assistant", "content": "Red."}
SFT = "supervised_finetuning.py"
COLOURS = ("red", "blue")
SIZES = [(16, 16), (24, 16), (16, 24), (20, 20)]


def save(path: Path, size=(16, 16), colour="red", mode="RGB", **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return str(path)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG with the header of a large image and hardly any data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def write_colours(folder: Path) -> Path:
    """Rows whose answer is the colour of an image, and rows without any."""
    rows = []
    for number, size in enumerate(SIZES):
        for colour in COLOURS:
            save(folder / "pics" / f"{colour}{number}.png", size, colour)
            question = {"role": "user", "content": "<image>Colour?"}
            answer = {"role": "assistant", "content": colour}
            rows.append({"messages": [question, answer], "images": [f"pics/{colour}{number}.png"]})
        rows.append({"prompt": f"Number {number}?", "response": "yes"})
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def flags(base: Any, data: Any, out: Any, *more: Any) -> list[Any]:
    """Flags of a run of `SFT` that learns colours in 20 epochs."""
    return [
        *("--model_name_or_path", base, "--train_file_dir", data, "--output_dir", out),
        *(() if "--template_name" in more else ("--template_name", "chatml")),
        *("--learning_rate", 1e-2, "--lora_rank", 16, "--lora_dropout", 0, "--per_device_train_batch_size", 6),
        *("--save_strategy", "no", "--sample_prompts", 0, *more),
    ]


def learn_colours(folder: Path) -> Path:
    """Train an adapter that answers with the colour of an image, and with `yes` without one; returns its folder."""
    data = write_colours(folder / "data")
    base = make_seeing(folder / "base", "qwen2_5_vl")
    open_stage(SFT, *flags(base, data, folder / "out", "--num_train_epochs", 20)).finish()
    return folder / "out"
