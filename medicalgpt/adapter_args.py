"""Flags for several adapters on one base, which front ends and the merge share."""

from dataclasses import dataclass, field

# Of peft's `add_weighted_adapter`.
COMBINATION_TYPES = (
    *("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)


@dataclass
class CombinationArguments:
    """How the adapters of `--lora_model` become one."""

    lora_weights: str | None = field(
        default=None,
        metadata={"help": "Combine the adapters of --lora_model with these weights, separated by commas (0.7,0.3)."},
    )
    combination_type: str | None = field(
        default=None,
        metadata={
            "help": "How they are combined, as in peft: cat, the default, is the exact weighted sum of their updates; "
            "docs/adapters.md explains the others.",
            "choices": list(COMBINATION_TYPES),
        },
    )
    density: float | None = field(
        default=None,
        metadata={"help": "Share of each adapter's values that ties, dare and magnitude_prune keep (0.5)."},
    )
    majority_sign_method: str | None = field(
        default=None,
        metadata={
            "help": "How ties and dare_ties choose the sign of a value: total, the default, by the sum; frequency, by "
            "the count.",
            "choices": ["total", "frequency"],
        },
    )
    svd_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of the result of svd and *_svd. Default: the largest rank of the adapters."},
    )
    combination_seed: int | None = field(
        default=None, metadata={"help": "Seed by which dare drops values. Default: 42."}
    )
