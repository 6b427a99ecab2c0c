"""The arithmetic of docs/distributed.md: bytes, seconds and tokens from formulae; no number is typed by hand."""

from math import sqrt

# Parameters of the published configurations: Qwen3-0.6B, Qwen3-8B, Qwen3-32B, Llama-3.1-70B.
MODELS = {"0.6B": 0.6e9, "8B": 8.2e9, "32B": 32.8e9, "70B": 70.6e9}
# Bytes per parameter on each of N GPUs: weights, gradients and the two states of AdamW, bfloat16 computation.
STATE = {
    "DDP": lambda gpus: 4 + 4 + 8 + (4 if gpus > 1 else 0),
    "ZeRO-1": lambda gpus: 2 + 2 + 12 / gpus,
    "ZeRO-2": lambda gpus: 2 + (2 + 12) / gpus,
    "ZeRO-3": lambda gpus: (2 + 2 + 12) / gpus,
    "FSDP2": lambda gpus: (4 + 4 + 8) / gpus,
}
GPUS = (1, 8, 64)
# An H100 SXM by its data sheet, at 40% of its peak: floating point operations per second in bfloat16.
FLOPS = 0.4 * 989e12
# Bytes per second and GPU, in each direction.
LINKS = {"NVLink": 450e9, "InfiniBand, 400 Gb/s": 50e9, "Ethernet, 100 Gb/s / 8 GPUs": 100e9 / 8 / 8}
# Gigabytes per second at which a shared file system takes a checkpoint.
DISK = 2e9
# GPU-hours between two failures: 419 in 54 days on 16,384 GPUs (https://arxiv.org/abs/2407.21783, section 3.3.4).
HOURS_BETWEEN_FAILURES = 54 * 24 / 419 * 16_384


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, rows)])


def _line(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def memory() -> str:
    """Gigabytes of state on each GPU, full fine-tuning, activations not counted."""
    sizes = [(model, gpus) for model in ("8B", "32B") for gpus in GPUS]
    rows = [
        [engine, *(f"{per_gpu(gpus) * MODELS[model] / 1e9:,.0f}" for model, gpus in sizes)]
        for engine, per_gpu in STATE.items()
    ]
    return table(["GB / GPU", *(f"{model}, N={gpus}" for model, gpus in sizes)], rows)


def communication() -> str:
    """Tokens of a GPU and step from which computing takes longer than communicating."""
    rows = [[link, *(f"{volume / 6 * FLOPS / speed:,.0f}" for volume in (8, 4, 6))] for link, speed in LINKS.items()]
    return table(["t", "DDP (8 P)", "ZeRO-1, ZeRO-2 (4 P)", "ZeRO-3, FSDP2 (6 P)"], rows)


def checkpoints() -> str:
    """Size and time of a checkpoint, hours between failures, the interval that loses least, and what is lost."""
    rows = []
    for model, gpus in (("0.6B", 8), ("8B", 8), ("8B", 64), ("32B", 64), ("70B", 512)):
        size = 16 * MODELS[model]
        seconds, between = size / DISK, HOURS_BETWEEN_FAILURES / gpus * 3600
        interval = sqrt(2 * seconds * between)
        lost = seconds / interval + interval / 2 / between
        rows.append(
            [
                f"{model}, N={gpus}",
                f"{size / 1e9:,.0f} GB",
                f"{seconds:,.0f} s",
                f"{between / 3600:,.0f} h",
                f"{interval / 60:,.0f} min",
                f"{lost:.1%}",
            ]
        )
    return table(["", "16 P", "d", "M", "sqrt(2 d M)", "d / i + i / 2M"], rows)


def tokens() -> str:
    """Tokens per second of one GPU, and of 512, with the bytes of their ids."""
    rows = [
        [
            model,
            f"{FLOPS / 6 / size:,.0f}",
            f"{512 * FLOPS / 6 / size:,.0f}",
            f"{4 * 512 * FLOPS / 6 / size / 1e6:,.1f} MB/s",
        ]
        for model, size in MODELS.items()
    ]
    return table(["", "N=1", "N=512", "4 bytes / token"], rows)


TABLES = (memory, communication, checkpoints, tokens)
