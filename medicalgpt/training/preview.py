"""The text of a training row as the loss sees it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from medicalgpt.data.encoding import IGNORED

from transformers import PreTrainedTokenizerBase


def sequences_of(row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of an encoded row; of a pair those of its prompt with the chosen and with the rejected answer."""
    if "input_ids" in row:
        return [(row["input_ids"], row["labels"])]
    prompt = row["prompt_ids"]
    answers = (row["chosen_ids"], row["rejected_ids"])
    return [(prompt + answer, [IGNORED] * len(prompt) + answer) for answer in answers]


# Fewer repetitions of a token than this are shown as they are.
REPETITIONS = 8


def decode_shortened(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids; of an added token that is repeated many times, as those of images are, once and how often."""
    text = ""
    added = tokenizer.added_tokens_decoder
    runs = [(token, len(list(run))) for token, run in itertools.groupby(ids)]
    pending: list[int] = []
    for token, count in runs:
        if token in added and count >= REPETITIONS:
            text += tokenizer.decode(pending) + f"{added[token].content}×{count}"
            pending = []
        else:
            pending += [token] * count
    return text + tokenizer.decode(pending)


def render_supervision(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int], colour: bool
) -> str:
    """The text of a row with its supervised tokens in green, or in ⟦ ⟧ without colour, and their share.

    Consecutive tokens are decoded together, so that a character that spans tokens is not split.

    Args:
        input_ids, labels: of one row, equally long; a label of -100 is not supervised.
    """
    start, end = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    parts: list[str] = []
    at = 0
    while at < len(input_ids):
        trained = labels[at] != IGNORED
        stop = at
        while stop < len(input_ids) and (labels[stop] != IGNORED) == trained:
            stop += 1
        text = decode_shortened(tokenizer, input_ids[at:stop])
        parts.append(f"{start}{text}{end}" if trained else text)
        at = stop
    count = sum(label != IGNORED for label in labels)
    return (
        f"first training row, trained tokens marked ({count} of {len(labels)}, {count / max(len(labels), 1):.0%}):\n"
        + "".join(parts)
        + "\n"
    )
