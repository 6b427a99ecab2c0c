"""Train on a stream of rows, and resume it exactly."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medicalgpt.args import DataArguments
from medicalgpt.data import batching
from medicalgpt.data.loading import LoadedData
from medicalgpt.data.streaming import Position, StreamedSamples
from medicalgpt.errors import UserError
from medicalgpt.models.vision import Vision
from medicalgpt.readers.problems import Place
from medicalgpt.training.finite import BatchRow
from medicalgpt.training.trainers import TokenTrainer

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from loguru import logger
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig

STATE_FILE = "stream.json"


def check_flags(data_args: DataArguments, args: SFTConfig, *, rows_can_be_too_long: bool) -> None:
    """Refuse flags that do not work with --streaming, and set what follows from it in `args`.

    Args:
        rows_can_be_too_long: the stage refuses rows by their number of tokens.

    Raises:
        UserError: one of them, with what to do instead.
    """
    given = args.given | data_args.given
    if not data_args.streaming:
        if "shuffle_buffer" in given:
            raise UserError(
                "--shuffle_buffer only has an effect with --streaming True; otherwise rows are fully shuffled."
            )
        return
    if args.max_steps <= 0:
        raise UserError(
            "--streaming needs --max_steps: the learning rate schedule covers all steps, and their number per epoch is "
            "unknown until all rows are tokenized. The log gives an estimate before the first step."
        )
    if rows_can_be_too_long and data_args.long_rows == "refuse":
        raise UserError(
            "--streaming tokenizes during training, so a row that is too long is found only then and cannot stop the "
            "run before it. Use --long_rows turns (the default) or --long_rows skip."
        )
    if data_args.shuffle_buffer < 1:
        raise UserError(
            f"--shuffle_buffer {data_args.shuffle_buffer} must be at least 1, which keeps the order of the files."
        )
    refused = {
        "num_train_epochs": "Use --max_steps only.",
        "overwrite_cache": "Nothing is cached.",
        "preprocessing_num_workers": "Tokenize in other processes with --dataloader_num_workers.",
        "ignore_data_skip": "A resumed run always continues with the next row.",
        "dataloader_drop_last": "Every batch is full: it continues with rows of the next epoch.",
        "dataloader_persistent_workers": "Workers always live as long as the run.",
        "dataloader_in_order": "Batches always come in order; otherwise a run could not be resumed.",
    }
    for name, remedy in refused.items():
        if name in given:
            raise UserError(f"--{name} has no effect with --streaming. {remedy}")
    if data_args.validation_split_percentage:
        raise UserError(
            "--validation_split_percentage needs all rows in memory, which --streaming avoids. Put the held-out rows "
            "into a separate file: --validation_file_dir."
        )
    if data_args.dataset_name:
        raise UserError(_files_of_dataset(data_args))
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            step = name.replace("strategy", "steps")
            raise UserError(f"--{name} epoch: with --streaming epochs have no end to stop at. Use --{step} N.")
    if args.train_sampling_strategy != "random":
        if "train_sampling_strategy" in given:
            raise UserError(
                f"--train_sampling_strategy {args.train_sampling_strategy} needs the lengths of all rows, which "
                "--streaming does not know. Omit it, or use --packing True to avoid padding."
            )
        args.train_sampling_strategy = "random"


def _files_of_dataset(data_args: DataArguments) -> str:
    """Why a data set is not streamed, and how its files are."""
    name = data_args.dataset_name
    is_here = Path(name).is_dir()
    folder = name if is_here else f"data/{Path(name).name}"
    download = f"run `hf download {name} --repo-type dataset --local-dir {folder}`, then "
    omitted = sorted({"dataset_name", "dataset_config_name", "dataset_split", "data_files"} & data_args.given)
    return (
        f"--streaming reads files, and --dataset_name {name} names a data set. To stream its files, "
        f"{'' if is_here else download}pass --train_file_dir {folder}; omit --{', --'.join(omitted)}.\n"
        "Or omit --streaming: data sets are kept on disk, not in memory."
    )


@dataclass
class StreamCollator:
    """A collator whose batches also have the places of their rows and the position of the last one in the stream."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "failure" in rows[-1]:
            return {"failure": rows[-1]["failure"]}
        places = [place for row in rows for place in row["places"]]
        last = {name: rows[-1][name] for name in ("position", "worker")}
        return {**self.collate(rows), **last, "places": places}


class StreamTrainer(TokenTrainer):
    """`TokenTrainer` on `StreamedSamples`.

    The library would end an epoch early or late where a stream ends, repeat the first samples so that all ranks have
    equally many, and skip to a checkpoint's position in the first epoch only. Here the stream has no end, each rank
    reads its own rows, and checkpoints have the `Position` of every reader.
    """

    def __init__(self, *, train_dataset: StreamedSamples, **kwargs: Any):
        # TRL inspects one row and accepts only datasets of its own type.
        super().__init__(train_dataset=train_dataset.drawn.select([0]), **kwargs)
        self.train_dataset = train_dataset
        self.args.ignore_data_skip = True
        self.positions: list[Position] = [Position()] * max(1, self.args.dataloader_num_workers)
        self.next_worker = 0
        self.step_places: list[list[Place]] = []
        self.add_callback(_StreamProgress(self))

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        readers = self.args.world_size * max(1, workers)
        if self.train_dataset.rows < readers:
            raise UserError(
                f"{self.train_dataset.rows} rows are too few for {readers} readers (processes x "
                "--dataloader_num_workers). Omit --streaming for so few rows."
            )
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=StreamCollator(self.data_collator),
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            pin_memory=self.args.dataloader_pin_memory,
            # Otherwise the loader would draw from the generator that dropout uses, once more in a resumed run.
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any) -> tuple[list, Any]:
        self.step_places = []
        return super().get_batch_samples(self._track_positions(epoch_iterator), *args)

    def _track_positions(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            if "failure" in batch:
                raise UserError(batch["failure"])
            self.step_places.append(batch.pop("places"))
            worker = batch.pop("worker")
            self.positions[worker] = batch.pop("position")
            self.next_worker = (worker + 1) % len(self.positions)
            yield batch

    def places_of(self, number: int, rows: Sequence[BatchRow]) -> list[list[Place]]:
        places = self.step_places[number]
        # A sequence of a single token, of which nothing is supervised, is not among the rows.
        return [[place] for place in places] if len(places) == len(rows) else [places] * len(rows)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            self._resume(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _resume(self, checkpoint: Path) -> None:
        saved = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        now = self.train_dataset.fingerprint(self.args.dataloader_num_workers)
        if changed := [name for name, value in now.items() if saved["order"][name] != value]:
            shown = ", ".join(f"{name} {saved['order'][name]} (now {now[name]})" for name in changed)
            raise UserError(
                f"{checkpoint} was streamed with another {shown}. Resume with the same value, or start again."
            )
        own = saved["readers"][self.args.process_index]
        self.positions = [Position(**position) for position in own["positions"]]
        self.next_worker = own["next_worker"]
        self.train_dataset.start, self.train_dataset.next_worker = list(self.positions), self.next_worker
        furthest = max(self.positions, key=lambda position: position.passed)
        again = self.train_dataset.data.seconds * furthest.row / self.train_dataset.rows
        logger.info(
            f"going on in epoch {furthest.epoch + 1} after row {furthest.row:,} of {self.train_dataset.rows:,}; the "
            f"rows before it are read again, not tokenized (about {again:.0f} s)"
        )

    def save_positions(self, checkpoint: Path) -> None:
        """Write the positions of all readers into a checkpoint. Call it on every process."""
        own = {"positions": [asdict(position) for position in self.positions], "next_worker": self.next_worker}
        readers = gather_object([own])
        if self.args.should_save:
            state = {"order": self.train_dataset.fingerprint(self.args.dataloader_num_workers), "readers": readers}
            (checkpoint / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def seen(self) -> dict[str, Any]:
        """What all processes have trained on so far, for run.json. Call it on every process.

        Rows of a window that is not trained to its end do not count yet: rows = used + left out, always.
        """
        positions = gather_object(self.positions)
        left_out = sum((Counter(position.left_out) for position in positions), Counter())
        rows = sum(position.rows for position in positions)
        shortened = sum(position.shortened for position in positions)
        return {
            "epochs_begun": max(position.epoch for position in positions) + 1,
            "epochs": round(sum(position.passed for position in positions) / len(positions), 4),
            "rows": rows,
            "used": rows - sum(left_out.values()),
            "left_out": dict(left_out),
            **({"shortened": shortened} if shortened else {}),
            "samples": sum(position.samples for position in positions),
        }


def token_trainer(
    model: PreTrainedModel | PeftModel,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: LoadedData,
    encode: Callable[[dict[str, Any]], Any],
    train: Dataset,
    validation: Dataset | None,
    *,
    block_size: int,
    streaming: bool,
    loraplus_lr_ratio: float | None,
    vision: Vision | None = None,
) -> TokenTrainer:
    """The trainer of encoded rows: streamed or in memory, packed into blocks where `args.packing` is set.

    Args:
        data, encode: the rows of `train` and how one is encoded; only streaming encodes them again.
        train, validation: encoded rows.
        block_size: tokens of a block.
        vision: if rows have images; they are neither streamed nor packed.
    """
    packed_size, encoded = block_size if args.packing else None, train
    if streaming:
        train = StreamedSamples(data, encode, train, packed_size, args.process_index, args.world_size)
    elif args.packing and "seq_lengths" not in train.column_names:
        train = batching.pack(train, block_size)
    collator = batching.collator(tokenizer, model)
    if vision:
        # It reads the paths of the images, which are not an argument of the model.
        args.remove_unused_columns = False
        collator = batching.ImageCollator(collator, vision)
    trainer = (StreamTrainer if streaming else TokenTrainer)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collator,
        loraplus_lr_ratio=loraplus_lr_ratio,
        vision=vision,
    )
    trainer.encoded = encoded
    return trainer


class _StreamProgress(TrainerCallback):
    """The epoch of the rows, since to the library the endless stream is one epoch, and the positions in checkpoints."""

    def __init__(self, trainer: StreamTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        positions = self.trainer.positions
        state.epoch = sum(position.passed for position in positions) / len(positions)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before `CheckpointCommitter`, which is added later: the manifest covers this file too.
        self.trainer.save_positions(Path(args.output_dir) / f"checkpoint-{state.global_step}")
