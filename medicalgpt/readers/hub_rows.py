"""Rows of a dataset on the hub, or of a folder that the library datasets can load."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medicalgpt.args import DataArguments
from medicalgpt.errors import UserError
from medicalgpt.readers.problems import Place, SourceRow, shorten
from medicalgpt.readers.sources import InputFile
from medicalgpt.readers.tables import present_values

from loguru import logger

if TYPE_CHECKING:
    from datasets import Dataset

# Names that splits of held-out rows have, the first of them that there is is used.
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")


def open_hub(arguments: DataArguments, with_validation: bool) -> Iterator[tuple[str, list[InputFile], int | None]]:
    """Side, rows and limit of the splits of a dataset.

    Raises:
        UserError: it cannot be loaded, or it lacks the split.
    """
    name, trained = arguments.dataset_name, arguments.dataset_split
    splits = _load(arguments)
    if trained not in splits:
        raise UserError(
            f"the dataset {name} has no split `{trained}`; it has {', '.join(splits)}. Choose one: --dataset_split "
            f"{next(iter(splits))}."
        )
    held_out = next((split for split in HELD_OUT_SPLITS if split in splits and split != trained), None)
    held_out = held_out if with_validation else None
    left_out = ", ".join(split for split in splits if split not in (trained, held_out)) or "none"
    logger.info(f"{name}: trained on split {trained}, held out {held_out or 'none'}, left out: {left_out}")
    for side, split, limit in (
        ("train", trained, arguments.max_train_samples),
        ("validation", held_out, arguments.max_eval_samples),
    ):
        if split:
            place = f"{name}/{split}"
            yield side, [InputFile(place, splits[split]._fingerprint, _hub_rows(place, splits[split]))], limit


def _load(arguments: DataArguments) -> "dict[str, Dataset]":
    import datasets

    name, files = arguments.dataset_name, arguments.data_files
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            if files or arguments.dataset_config_name:
                raise UserError(
                    f"{name} was saved by save_to_disk, which has no configurations or files to choose. Omit "
                    "--dataset_config_name and --data_files."
                )
            saved = datasets.load_from_disk(name)
            return dict(saved) if isinstance(saved, dict) else {arguments.dataset_split: saved}
        chosen = [part.strip() for part in files.split(",") if part.strip()] if files else None
        return dict(datasets.load_dataset(name, arguments.dataset_config_name, data_files=chosen))
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {shorten(str(error), 300)}"
        if "onfig name is missing" in reason or "BuilderConfig" in reason:
            raise UserError(
                f"the dataset {name} needs another configuration ({reason}). Choose one: --dataset_config_name NAME."
            ) from error
        raise UserError(
            f"the dataset {name} could not be loaded from the hub ({reason}). Check the name and the network, set "
            "HF_ENDPOINT to a mirror, or use files with --train_file_dir."
        ) from error


def _hub_rows(name: str, split: "Dataset") -> Iterator[SourceRow]:
    for number, value in enumerate(split, start=1):
        # Columns that a row of mixed formats does not have are None.
        yield SourceRow(Place(name, number), present_values(value))
