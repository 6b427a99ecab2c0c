"""Compare the settings of a resumed run with those of the run that made its checkpoint (see resume_flags.py)."""

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file, write_atomically
from medicalgpt.models import hub
from medicalgpt.models.adapters import SHAPE_FLAGS
from medicalgpt.training.resume_flags import (
    CONFIGS,
    DATA_PLACES,
    FACTS,
    GLOBAL_BATCH,
    OTHER_FILES,
    OTHER_MODELS,
    VERSION,
    Policy,
    WayOut,
    group_of,
)

from loguru import logger
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

MISSING = object()
MODEL_PLACES = ("model_name_or_path", "peft_path", "model_revision", "hub")
# Of an entry of `data` in run.json.
ROW_KEYS = ("sha256", "rows", "used", "shortened", "drawn", "images_sha256")
HASHED = (*OTHER_MODELS, *OTHER_FILES)


@dataclass(frozen=True)
class Difference:
    """A flag or a fact that is not as it was.

    Attributes:
        reason: why it may not be so; empty if it may.
    """

    name: str
    before: Any
    now: Any
    reason: str = ""
    way_out: WayOut = WayOut.FROM_WEIGHTS

    @property
    def label(self) -> str:
        """A flag as it is typed, a fact as it is called."""
        is_fact = self.name in FACTS or self.name.startswith(VERSION)
        return FACTS.get(self.name, self.name) if is_fact else f"--{self.name}"

    def __str__(self) -> str:
        return f"{self.label} {_text(self.now)} (before: {_text(self.before)})"


def recorded_run(checkpoint: Path) -> dict[str, Any]:
    """run.json of the run that made a checkpoint: the checkpoint's own copy, or that of its output folder; else {}."""
    for file in (checkpoint / hub.RUN_FILE, checkpoint.parent / hub.RUN_FILE):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.warning(f"{file} cannot be read ({error})")
            continue
        if isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in ("arguments", "base")):
            return record
    logger.warning(f"no {hub.RUN_FILE} says with which settings {checkpoint} was made, so they cannot be compared")
    return {}


class StepsOfFlags(TrainerCallback):
    """Log, evaluate and save as often as the flags say; the library keeps the numbers of the checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class RecordInCheckpoint(TrainerCallback):
    """Write run.json into each checkpoint before it is committed, so that it can be resumed from any folder."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            text = json.dumps(self.record, ensure_ascii=False, indent=2, default=str)
            write_atomically(Path(args.output_dir) / f"checkpoint-{state.global_step}" / hub.RUN_FILE, text + "\n")


def contents(groups: Sequence[Any], checkpoint: hub.Checkpoint) -> dict[str, str | None]:
    """Hashes of what the flags name: the base, the adapter on it, further models and files, and their configurations.

    Args:
        groups: argument dataclasses.

    Returns:
        By flag or fact, hexadecimal; None for a model that is not on this machine yet, or not in safetensors files.
    """
    found = {
        "base": hub.fingerprint(checkpoint.source, revision=checkpoint.revision, cache_dir=checkpoint.cache_dir),
        "config": _hash_of_configs(
            checkpoint.source, checkpoint.adapter, revision=checkpoint.revision, cache_dir=checkpoint.cache_dir
        ),
    }
    if checkpoint.adapter:
        found["adapter"] = _hash_of_adapter(checkpoint.adapter)
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name, None)
            if not isinstance(value, str) or not value:
                continue
            if field.name in OTHER_MODELS:
                base, adapter = hub.resolve_checkpoint(value)
                found[field.name] = _hash_of_model(base, adapter, checkpoint.cache_dir)
                found[CONFIGS[field.name]] = _hash_of_configs(base, adapter, cache_dir=checkpoint.cache_dir)
            elif field.name in OTHER_FILES and Path(value).is_file():
                found[field.name] = hash_file(value)
    return found


def _hash_of_configs(base: str, adapter: hub.Adapter | None, **options: Any) -> str | None:
    found = hub.hash_config(base, **options)
    if adapter is None or found is None:
        return found
    # The base may be somewhere else, and peft writes its version.
    own = hub.hash_settings(adapter.config, but=("base_model_name_or_path", "peft_version", "inference_mode"))
    return hashlib.sha256(f"{found} {own}".encode()).hexdigest()


def _hash_of_model(base: str, adapter: hub.Adapter | None, cache_dir: str | None) -> str | None:
    weights = hub.fingerprint(base, cache_dir=cache_dir)
    if adapter is None or weights is None:
        return weights
    return hashlib.sha256(f"{weights} {_hash_of_adapter(adapter)}".encode()).hexdigest()


def _hash_of_adapter(adapter: hub.Adapter) -> str | None:
    weights = Path(adapter.path) / "adapter_model.safetensors"
    return hash_file(weights) if weights.is_file() else None


def contents_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of a tokenizer with its special tokens, and of its chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # These are set by whoever has called it last.
    parts = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    parts["special_tokens"] = tokenizer.special_tokens_map
    return {"tokenizer": _hash_of(parts), "template": _hash_of(tokenizer.chat_template)}


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class ResumedRun:
    """The run that made the checkpoint which is resumed, to compare with.

    Args:
        checkpoint: folder of the checkpoint.
        groups: argument dataclasses of the run that resumes it.
    """

    def __init__(self, checkpoint: str, groups: Sequence[Any]):
        self.checkpoint = Path(checkpoint)
        self.before = recorded_run(self.checkpoint)
        self.given = frozenset().union(*(getattr(group, "given", ()) for group in groups))
        self.defaults = {field.name: field.default for group in groups for field in dataclasses.fields(group)}

    def defaults_from_rows(self) -> dict[str, Any]:
        """`values` of flags that followed from the number of rows and are still not set, with the `reason`."""
        found = self.before.get("defaults_from_rows") or {"values": {}, "reason": ""}
        values = {name: value for name, value in found["values"].items() if name not in self.given}
        return {"values": values, "reason": found["reason"]}

    def require_same(self, record: Mapping[str, Any], output_dir: Path) -> list[Any]:
        """Compare, and log what has changed and may change.

        Returns:
            `changed_on_resume` of run.json: for each resume the checkpoint and what had changed since it was made.

        Raises:
            UserError: see `refuse`.
        """
        differences = self.compare(record)
        self.refuse(differences, record, output_dir)
        for each in differences:
            logger.info(f"changed on resume: {each}")
        changes = {each.name: {"before": each.before, "now": each.now} for each in differences}
        return [
            *self.before.get("changed_on_resume", []),
            *([{"checkpoint": str(self.checkpoint), "changes": changes}] if changes else []),
        ]

    def require_finished(self, record: Mapping[str, Any]) -> None:
        """Compare with a run that has finished, to which nothing is added.

        Raises:
            UserError: it was another training than `record` asks for, or a shorter one.
        """
        changed = [
            each for each in self.compare(record) if each.reason or each.name in ("max_steps", "num_train_epochs")
        ]
        # Nothing is left to be divided.
        changed = [each for each in _without_consequences(changed) if each.name not in ("processes", "engine")]
        if not changed:
            return
        longer = all(not each.reason for each in changed)
        raise UserError(
            f"the run in {self.checkpoint} has finished, with other settings: {', '.join(map(str, changed))}. Nothing "
            "was trained.\nTo train with these, choose another --output_dir, or replace the run: "
            "--overwrite_output_dir True."
            + (" To continue it from its last checkpoint: --resume_from_checkpoint True." if longer else "")
        )

    def require_same_rows(self, record: Mapping[str, Any], output_dir: Path) -> None:
        """Compare the training rows, wherever their files are, and the blocks that they were packed in.

        Args:
            record: of the run that resumes, with its data.

        Raises:
            UserError: some would be trained twice, others never.
        """
        before, data = self.before.get("data", []), record["data"]
        if before and _training_rows(before) != _training_rows(data):
            raise UserError(
                f"{self.checkpoint} was trained on other rows than these; resuming would repeat some and skip others. "
                f"It was trained on {_rows_text(before)}; these are {_rows_text(data)}.\nPass the same data and the "
                "same data flags, or start again in another --output_dir."
            )
        shards, shards_now = _division(before), _division(data)
        # A checkpoint of an earlier version has only the hash of their index.
        if before and shards != shards_now and _indexes(before) != _indexes(data):
            places = [each for each in self.compare(record) if each.name in DATA_PLACES]
            remedy = self.as_before(places, {}, record) or f"prepare the same rows in {_shards_text(shards)}"
            raise UserError(
                f"{self.checkpoint} was trained on blocks packed in {_shards_text(shards)}; these are packed in "
                f"{_shards_text(shards_now)}, which makes other blocks, so that resuming would repeat some rows and "
                f"skip others.\n  To resume it, {remedy}.\n  With these blocks, start another run"
                f"{self.way_out([], output_dir)}."
            )

    def compare(self, record: Mapping[str, Any]) -> list[Difference]:
        """All differences between the run of the checkpoint and `record`, in the order of the flags.

        What one of the two does not record is not compared.
        """
        if not self.before:
            return []
        record = json.loads(json.dumps(record, default=str))
        before, now = _arguments(self.before), _arguments(record)
        found = [*_different_contents(self.before, record), *_different_flags(before, now)]
        return [*found, *self._too_short(before, now, {each.name for each in found})]

    def _too_short(self, before: Mapping[str, Any], now: Mapping[str, Any], changed: set[str]) -> Iterator[Difference]:
        """A number of steps or epochs that the checkpoint has reached already."""
        file = self.checkpoint / TRAINER_STATE_NAME
        state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        step, epoch = state.get("global_step", 0), state.get("epoch") or 0
        name, done = ("max_steps", step) if now.get("max_steps", -1) > 0 else ("num_train_epochs", epoch)
        if name in changed and now[name] <= done:
            reason = f"the checkpoint has {done:g} already, so that nothing would be trained"
            yield Difference(name, before[name], now[name], reason)

    def refuse(self, differences: Sequence[Difference], record: Mapping[str, Any], output_dir: Path) -> None:
        """Refuse what may not change, all of it at once.

        Args:
            record: of the run that resumes.

        Raises:
            UserError: each difference with the reason, how to resume after all, and how to train with the new values.
        """
        refused = _without_consequences([each for each in differences if each.reason])
        if self.before.get("arguments", {}).get("save_only_model"):
            raise UserError(
                f"{self.checkpoint} was saved with --save_only_model True: it has no state of the optimizer to resume "
                f"with. Start another run{self.way_out(refused, output_dir)}."
            )
        if not refused:
            return
        reasons: dict[str, list[str]] = {}
        for each in refused:
            reasons.setdefault(each.reason, []).append(str(each))
        raise UserError(
            "\n  ".join(
                [
                    f"{self.checkpoint} cannot be resumed with these settings:",
                    *(f"{', '.join(changed)}: {reason}." for reason, changed in reasons.items()),
                    f"To resume it, {self.as_before(refused, {each.name: each for each in differences}, record)}.",
                    f"With the new settings, start another run{self.way_out(refused, output_dir)}.",
                ]
            )
        )

    def as_before(
        self, refused: Sequence[Difference], places: Mapping[str, Difference], record: Mapping[str, Any]
    ) -> str:
        """What to pass and what to omit, so that everything is as it was.

        Args:
            places: flags that name another place than before, by name.
            record: of the run that resumes.
        """
        passed, omitted, others = [], [], []
        if accumulation := _accumulation(refused, self.before, record):
            # On other machines, the number of processes is rarely a matter of choice.
            passed.append(_as_flag("gradient_accumulation_steps", accumulation))
            refused = [each for each in refused if each.name not in GLOBAL_BATCH]
        flags = [each for each in refused if each.name not in FACTS]
        for each in refused:
            named = {"base": MODEL_PLACES, "adapter": MODEL_PLACES, "config": MODEL_PLACES}
            named |= {"tokenizer": ("tokenizer_name_or_path",), **{CONFIGS[flag]: (flag,) for flag in CONFIGS}}
            moved = [places[name] for name in named.get(each.name, ()) if name in places]
            flags += moved
            if each.name in ("tokenizer", "template") and not moved:
                # As the checkpoint has saved it.
                passed.append(_as_flag("tokenizer_name_or_path", str(self.checkpoint)))
            elif each.name in ("base", "adapter", "config") and not moved:
                others.append(f"restore {FACTS[each.name]} {self.before['base']['name']}")
            elif each.name in CONFIGS.values() and not moved:
                others.append(f"restore {FACTS[each.name]}")
            elif each.name == "engine":
                others.append(f"start it with{'out DeepSpeed and FSDP' if each.before == 'DDP' else ' ' + each.before}")
            elif each.name == "processes":
                others.append(f"start {each.before} process(es)")
            elif each.name == "stage":
                others.append(f"run {each.before}.py")
        for each in flags:
            if each.before is None or (each.name in self.given and each.before == self.defaults.get(each.name)):
                omitted.append(f"--{each.name}")
            else:
                passed.append(_as_flag(each.name, each.before))
        return "; ".join([*dict.fromkeys(others), *_changes(dict.fromkeys(passed), list(dict.fromkeys(omitted)))])

    def way_out(self, refused: Sequence[Difference], output_dir: Path) -> str:
        """How to train with the new settings, from the weights of the checkpoint if that is possible."""
        ways, omitted = {each.way_out for each in refused}, ["--resume_from_checkpoint"]
        passed = {"output_dir": str(_free(output_dir))}
        if WayOut.NEW_RUN in ways:
            return ": " + "; ".join(_changes([_as_flag(*each) for each in passed.items()], omitted))
        merge, weights = "", str(self.checkpoint)
        if WayOut.MERGED in ways:
            weights = f"{self.checkpoint}-merged"
            merge = (
                f"python merge_peft_adapter.py {_as_flag('lora_model', str(self.checkpoint))} "
                f"{_as_flag('output_dir', weights)}, then "
            )
        elif self.before["arguments"].get("use_peft"):
            # The adapter keeps its shape.
            omitted += [f"--{name}" for name in sorted((SHAPE_FLAGS | {"freeze_layers"}) & self.given)]
        omitted += ["--peft_path"] if "peft_path" in self.given else []
        passed = {"model_name_or_path": weights, **passed}
        return f" from these weights: {merge}" + "; ".join(
            _changes([_as_flag(*each) for each in passed.items()], omitted)
        )


def _without_consequences(refused: Sequence[Difference]) -> list[Difference]:
    """Without what differs because another program, base or template was named."""
    names, implied = {each.name for each in refused}, set()
    if "stage" in names:
        return [each for each in refused if each.name == "stage"]
    if "base" in names:
        implied |= {"config", "tokenizer", "template"}
    implied |= {CONFIGS[name] for name in names if name in CONFIGS}
    if names & {"fsdp", "deepspeed"}:
        implied |= {"engine"}
    if names & {"template_name", "tool_format", "system_prompt", "tokenizer"}:
        implied |= {"template"}
    return [each for each in refused if each.name not in implied]


def _accumulation(refused: Sequence[Difference], before: Mapping[str, Any], now: Mapping[str, Any]) -> int | None:
    """The accumulation with which another number of processes has the same rows per step, if there is one."""
    before, now = _arguments(before), _arguments(now)
    if {each.reason for each in refused if each.name == "processes"} != {_reason_of_batch(before, now)}:
        return None
    accumulation, rest = divmod(_global_batch(before), _global_batch({**now, "gradient_accumulation_steps": 1}))
    return None if rest else accumulation


def _arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run, those that follow from others set to what they mean."""
    found = dict(record.get("arguments", {}))
    found |= {name: record[name] for name in ("stage", "processes", "engine") if name in record}
    found |= {f"{VERSION}{name}": version for name, version in record.get("versions", {}).items()}
    if found.get("data_seed", MISSING) is None:
        found["data_seed"] = found.get("seed")
    if found.get("qlora"):
        found["load_in_4bit"] = True
    return found


def _different_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name, value in now.items():
        old, group = before.get(name, MISSING), group_of(name)
        if old is MISSING or _same(old, value) or group.policy is Policy.START or name in HASHED:
            continue
        if name == "data_seed" and (before["seed"], now["seed"]) == (old, value):
            # It follows from the seed.
            continue
        reason = next((unless.reason for unless in group.unless if unless.applies(before, now)), "")
        if group.policy is Policy.FIXED:
            reason = group.reason
        elif group.policy is Policy.SAME_PRODUCT and not reason and _global_batch(before) != _global_batch(now):
            reason = _reason_of_batch(before, now)
        yield Difference(name, old, value, reason, group.way_out)


def _different_contents(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """What the flags name: compared by its hash, or by its name where one of the two runs has no hash of it."""
    hashes_before, hashes = before.get("contents") or {"base": before["base"].get("fingerprint")}, now["contents"]
    names_before, names = _names(before), _names(now)
    for name in ("base", "adapter", "config", "tokenizer", "template", *HASHED, *CONFIGS.values()):
        old_hash, new_hash = hashes_before.get(name), hashes.get(name)
        old_name, new_name = names_before.get(name, MISSING), names.get(name, MISSING)
        renamed = old_name is not MISSING and new_name is not MISSING and not _same(old_name, new_name)
        group, shown = group_of(name), (old_name, new_name) if renamed else (old_hash, new_hash)
        if old_hash != new_hash if old_hash and new_hash else renamed:
            yield Difference(name, *shown, group.reason, group.way_out)
        elif renamed and name in HASHED:
            yield Difference(name, *shown)


def _names(record: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: record["base"].get(key, MISSING) for name, key in (("base", "name"), ("adapter", "adapter"))}
    return found | {name: record["arguments"][name] for name in HASHED if name in record["arguments"]}


def _training_rows(data: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """What determines the rows that training draws from, wherever the files are."""
    return [[entry.get(key) for key in ROW_KEYS] for entry in data if entry["side"] == "train"]


def _division(data: Sequence[Mapping[str, Any]]) -> int:
    """How many parts the training rows were packed in, each by itself."""
    return max((entry.get("packed_shards", 1) for entry in data if entry["side"] == "train"), default=1)


def _indexes(data: Sequence[Mapping[str, Any]]) -> list[str | None]:
    return [entry.get("prepared") for entry in data if entry["side"] == "train"]


def _shards_text(shards: int) -> str:
    return "one piece" if shards == 1 else f"{shards} shards (prepare_data.py --shard 1/{shards} to {shards}/{shards})"


def _rows_text(data: Sequence[Mapping[str, Any]]) -> str:
    entries = [entry for entry in data if entry["side"] == "train"]
    files = ", ".join(entry["file"] for entry in entries[:3]) + (", …" if len(entries) > 3 else "")
    return f"{sum(entry['used'] for entry in entries)} rows of {files}"


def _global_batch(arguments: Mapping[str, Any]) -> int:
    return math.prod(arguments.get(name) or 1 for name in GLOBAL_BATCH)


def _reason_of_batch(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{group_of('processes').reason}, {_global_batch(before)} before, {_global_batch(now)} now"


def _same(before: Any, now: Any) -> bool:
    # The trainer makes an empty dictionary of a setting that is not given.
    return before == now or (before in (None, {}) and now in (None, {}))


def _changes(passed: Iterable[str], omitted: Sequence[str]) -> Iterator[str]:
    if omitted:
        yield f"omit {', '.join(omitted)}"
    if text := " ".join(passed):
        yield f"pass {text}"


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"--{name} {shlex.join(map(str, value))}"
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return f"--{name} {shlex.quote(text)}"


def _text(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and all(digit in "0123456789abcdef" for digit in value):
        return value[:12]
    if isinstance(value, dict):
        return json.dumps(value)
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _free(output_dir: Path) -> Path:
    number = 2
    while output_dir.with_name(f"{output_dir.name}-{number}").exists():
        number += 1
    return output_dir.with_name(f"{output_dir.name}-{number}")
