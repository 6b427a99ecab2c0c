"""Resolve a checkpoint: a folder or a hub name, an adapter and its base, and the fingerprint of the base's weights."""

import functools
import hashlib
import json
import re
import shlex
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medicalgpt.args import ModelArguments
from medicalgpt.errors import UserError

from huggingface_hub import constants
from loguru import logger
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.utils import cached_file, find_adapter_config_file

ADAPTER_CONFIG = "adapter_config.json"
RUN_FILE = "run.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Names of the head of a model for sequences; peft trains it in full and saves it with an adapter.
HEADS = ("score", "classifier")


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or does not fit the one it is used with."""


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Get the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object {{...}}, it holds a {type(value).__name__}. Get it again.")
    return value


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, as the files next to its weights describe it.

    Attributes:
        path: folder or hub name.
        config: contents of adapter_config.json.
        recorded_base: from run.json, the base that it was trained on: `name`, `fingerprint` and, if its positions were
            scaled, `rope_parameters`. Empty for an adapter that was not trained here.
    """

    path: str
    config: dict[str, Any]
    recorded_base: dict[str, Any]

    @classmethod
    def read(cls, path: str, cache_dir: str | None = None) -> "Adapter":
        """Read an adapter's files without its weights.

        Raises:
            CheckpointError: there is no such folder or no adapter_config.json, or it is damaged.
        """
        found: str | Path | None = Path(path) / ADAPTER_CONFIG
        if not Path(path).is_dir():
            if _looks_local(path):
                raise CheckpointError(f"no adapter folder {path} (looked in {Path.cwd()}).")
            found = find_adapter_config_file(path, cache_dir=cache_dir, local_files_only=not _hub_is_reachable())
        if found is None or not Path(found).is_file():
            raise CheckpointError(f"{path} is not an adapter: it has no {ADAPTER_CONFIG}.")
        config = _read_object(Path(found))
        if not isinstance(config.get("base_model_name_or_path") or "", str):
            raise CheckpointError(f"{found} does not name its base model: base_model_name_or_path must be text.")
        # For a checkpoint of a run, the record is in the folder above.
        records = (Path(path) / RUN_FILE, Path(path).parent / RUN_FILE)
        record = next((_read_object(file) for file in records if file.is_file()), {})
        return cls(path, config, record.get("base") or {})

    @property
    def positions(self) -> dict[str, Any]:
        """The `rope_parameters` that its base must be loaded with; empty if they are the base's own."""
        rope = self.recorded_base.get("rope_parameters")
        return {"rope_parameters": rope} if rope else {}

    @property
    def has_tokenizer(self) -> bool:
        return (Path(self.path) / TOKENIZER_CONFIG).is_file()


@dataclass(frozen=True)
class Checkpoint:
    """A model as resolved at the start of a program, and passed on, so that nothing is resolved or read twice.

    Attributes:
        name: as passed by the user: a hub name, a folder, or the folder of an adapter.
        base: hub name or folder of the base model.
        source: what transformers loads the base from: `base`, or the folder that ModelScope downloaded it to.
        config: configuration of the base, with the positions that the adapter was trained with.
        adapter: the adapter on the base, if any.
        tokenizer: hub name or folder of the tokenizer.
        revision: branch, tag or commit of the base on the hub.
        cache_dir: where downloads are kept.
    """

    name: str
    base: str
    source: str
    config: PreTrainedConfig
    adapter: Adapter | None
    tokenizer: str
    revision: str | None = None
    cache_dir: str | None = None

    @classmethod
    def resolve(
        cls,
        name_or_path: str,
        *,
        adapter: str | None = None,
        adapter_flag: str = "--peft_path",
        tokenizer: str | None = None,
        hub: str = "huggingface",
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> "Checkpoint":
        """Find base, adapter and tokenizer, and load the configuration of the base.

        Args:
            adapter: an adapter to put on the model.
            adapter_flag: the flag that names it, for messages.
            tokenizer: a tokenizer other than the adapter's or, if that has none, the base's.
            hub: `huggingface` or `modelscope`.

        Raises:
            CheckpointError: the model is not found, or `adapter` is not an adapter.
            UserError: the model is an adapter already.
        """
        base, trained = resolve_checkpoint(name_or_path)
        if trained and adapter:
            raise UserError(
                f"{name_or_path} is an adapter already, and {adapter_flag} names another: {adapter}. Leave "
                f"{adapter_flag} out, or merge the first one into its base: {merge_command(name_or_path)}"
            )
        if adapter:
            try:
                trained = Adapter.read(fetch(adapter, hub, cache_dir=cache_dir), cache_dir)
            except CheckpointError as error:
                raise CheckpointError(f"{error} Check {adapter_flag}.") from error
        source = fetch(base, hub, revision, cache_dir)
        config = load_pretrained(AutoConfig, source, revision=revision, cache_dir=cache_dir)
        for name, value in trained.positions.items() if trained else ():
            setattr(config.get_text_config(), name, value)
        if tokenizer:
            tokenizer = tokenizer_source(fetch(tokenizer, hub, revision, cache_dir))
        else:
            tokenizer = trained.path if trained and trained.has_tokenizer else source
        return cls(name_or_path, base, source, config, trained, tokenizer, revision, cache_dir)

    @classmethod
    def from_arguments(cls, arguments: ModelArguments, adapter: str | None = None) -> "Checkpoint":
        """The model that the flags name, with the adapter of `--peft_path`. Errors are those of `resolve`."""
        return cls.resolve(
            arguments.model_name_or_path,
            adapter=adapter,
            tokenizer=arguments.tokenizer_name_or_path,
            hub=arguments.hub,
            revision=arguments.model_revision,
            cache_dir=arguments.cache_dir,
        )

    @cached_property
    def fingerprint(self) -> str | None:
        """Fingerprint of the base's weights (see `fingerprint`), once they are on this machine."""
        return fingerprint(self.source, revision=self.revision, cache_dir=self.cache_dir)


def resolve_checkpoint(name_or_path: str) -> tuple[str, Adapter | None]:
    """(base model, adapter or None): the folder of an adapter means its base with the adapter on it.

    Raises:
        CheckpointError: a local path that is not a checkpoint, or an adapter whose base is missing.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if _looks_local(name_or_path):
            raise CheckpointError(
                f"no checkpoint folder {name_or_path} (looked in {Path.cwd()}). Give the path of a folder with "
                "config.json or adapter_config.json, or a name on the hub such as Qwen/Qwen3-0.6B."
            )
        return name_or_path, None
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = Adapter.read(name_or_path)
        base = adapter.config.get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name its base model.")
        if not Path(base).is_dir():
            # The path is relative to the folder where training ran, which need not be the current one.
            found = next((parent / base for parent in folder.resolve().parents if (parent / base).is_dir()), None)
            if found:
                logger.info(f"base of the adapter: {found}")
                return str(found), adapter
        if _looks_local(base) and not Path(base).is_dir():
            raise CheckpointError(
                f"the adapter {folder} was trained on {base}, which is not there (looked in {Path.cwd()}). "
                "Run from the folder where it was trained, or correct base_model_name_or_path in "
                f"{folder / ADAPTER_CONFIG}."
            )
        return base, adapter
    if not (folder / "config.json").is_file():
        inner = sorted(child.parent for name in ("config.json", ADAPTER_CONFIG) for child in folder.glob(f"*/{name}"))
        hint = f" Did you mean {inner[0]}?" if inner else ""
        raise CheckpointError(f"{folder} is not a checkpoint: it has neither config.json nor {ADAPTER_CONFIG}.{hint}")
    return name_or_path, None


def tokenizer_source(name_or_path: str) -> str:
    """Folder or hub name to load a tokenizer from: the base, for an adapter without a tokenizer."""
    if (Path(name_or_path) / TOKENIZER_CONFIG).is_file():
        return name_or_path
    return resolve_checkpoint(name_or_path)[0]


def _looks_local(name_or_path: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path) is None


def fetch(name_or_path: str, hub: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """Download a name on ModelScope and return its folder; return a local folder, or a name on Hugging Face, as it is.

    Raises:
        CheckpointError: the package modelscope is missing, or the download fails.
    """
    if Path(name_or_path).is_dir() or hub == "huggingface":
        return name_or_path
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise CheckpointError("--hub modelscope needs its package: pip install modelscope") from error
    logger.info(f"looking up {name_or_path} on ModelScope")
    try:
        return snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir)
    except Exception as error:
        raise CheckpointError(f"ModelScope could not provide {name_or_path}: {error}") from error


@functools.cache
def _hub_is_reachable() -> bool:
    """Whether a connection to the hub can be opened at all; the hub's client takes a minute to find out."""
    if constants.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
    except OSError as error:
        logger.warning(f"{constants.ENDPOINT} cannot be reached ({error}); only earlier downloads are used")
        return False
    return True


def load_pretrained(loader: Any, name_or_path: str, **options: Any) -> Any:
    """`loader.from_pretrained(name_or_path, **options)`, with errors that say what to do.

    Args:
        loader: AutoConfig, AutoTokenizer, AutoModelForCausalLM, ...

    Raises:
        CheckpointError: not found, damaged, of an unknown type, or with custom code, which is never run.
    """
    if not Path(name_or_path).is_dir() and not _hub_is_reachable():
        options["local_files_only"] = True
    try:
        # Unset, it would ask in a terminal whether to run the code of a checkpoint.
        return loader.from_pretrained(name_or_path, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{name_or_path} needs its own code, and code of a checkpoint is never run here. Use one that "
                "transformers itself supports (often with -hf in its name); docs/models.md lists the families."
            ) from error
        if unknown := re.search(r"model type `(\S+)` but Transformers does not recognize", str(error)):
            raise CheckpointError(
                f"{name_or_path} is of the type {unknown[1]}, which transformers {transformers_version} does not know. "
                "docs/models.md lists the families; a newer one may need a newer transformers."
            ) from error
        if Path(name_or_path).is_dir():
            raise CheckpointError(f"{name_or_path} could not be loaded: {error}") from error
        raise CheckpointError(
            f"{name_or_path} is not a folder here ({Path.cwd()}), and could not be downloaded from "
            f"{constants.ENDPOINT}: {str(error).splitlines()[0]}\n"
            "Check the name; offline, pass the path of a downloaded folder; behind a firewall, set "
            "HF_ENDPOINT=https://hf-mirror.com or use --hub modelscope."
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # A damaged file of a checkpoint meets the library at many places, with errors of any type.
        if type(error).__name__ in ("OutOfMemoryError", "ImportError", "ModuleNotFoundError"):
            raise
        first = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"{name_or_path} could not be loaded: {type(error).__name__}: {' '.join(' '.join(first[:2]).split())}\n"
            "One of its files (config.json, tokenizer.json, weights) is damaged or of another model. Get it again."
        ) from error


def merge_command(adapter: str) -> str:
    """A command that merges an adapter into its base, to be shown to the user."""
    folder, merged = shlex.quote(adapter), shlex.quote(f"{adapter.rstrip('/')}-merged")
    return f"python merge_peft_adapter.py --lora_model {folder} --output_dir {merged}"


def check_base(adapter: Adapter, base: str) -> None:
    """Compare the base that an adapter was trained on with `base`, by the fingerprints of their weights.

    An adapter without run.json was not trained here and cannot be checked; a warning says so.

    Raises:
        CheckpointError: they differ.
    """
    recorded = adapter.recorded_base
    if not recorded.get("fingerprint"):
        logger.warning(f"{adapter.path} does not record its base's weights; whether {base} is the right one is unknown")
        return
    found = fingerprint(base)
    if found and found != recorded["fingerprint"]:
        raise CheckpointError(
            f"the adapter {adapter.path} was trained on {recorded['name']} (weights {recorded['fingerprint'][:12]}), "
            f"but {base} has other weights ({found[:12]}). Pass the base that it was trained on."
        )


def fingerprint(name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """A hash that distinguishes sets of weights, in well under a second even for large models.

    It covers the name, type and shape of each tensor and 3 x 64 bytes of its data, however the tensors are divided
    into files.

    Returns:
        Hexadecimal digits; None if the weights are not in safetensors files on this machine.

    Raises:
        CheckpointError: a file that is not a safetensors file, or ends within its header.
    """
    tensors: dict[str, bytes] = {}
    for path, start_of_data, header in _headers(name_or_path, revision, cache_dir):
        with open(path, "rb") as file:
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{name} {entry['dtype']} {entry['shape']}".encode())
                for at in (start, (start + end) // 2, max(start, end - 64)):
                    file.seek(start_of_data + at)
                    digest.update(file.read(min(64, end - at)))
                tensors[name] = digest.digest()
    if not tensors:
        return None
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()


def weight_shapes(
    name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None
) -> dict[str, list[int]]:
    """The shape of each tensor in the safetensors files of a checkpoint; empty if they are not on this machine.

    Raises:
        CheckpointError: see `fingerprint`.
    """
    headers = _headers(name_or_path, revision, cache_dir)
    return {name: entry["shape"] for _, _, header in headers for name, entry in header.items()}


def _headers(
    name_or_path: str, revision: str | None, cache_dir: str | None
) -> Iterator[tuple[Path, int, dict[str, dict[str, Any]]]]:
    """Each file of weights on this machine: its path, where its data begins, and dtype, shape and place by name."""
    folder = _folder_of(name_or_path, revision, cache_dir)
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        if path.name.startswith("adapter_"):
            continue
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length) if length <= path.stat().st_size else b"")
            except ValueError as error:
                raise CheckpointError(f"{path} is damaged or incomplete; get the file again.") from error
        header.pop("__metadata__", None)
        yield path, 8 + length, header


def hash_config(name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """A hash of config.json, whatever its layout and whoever has written it; None if it is not on this machine.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = _folder_of(name_or_path, revision, cache_dir)
    if folder is None or not (folder / "config.json").is_file():
        return None
    return hash_settings(_read_object(folder / "config.json"), but=("transformers_version", "_name_or_path"))


def hash_settings(settings: Mapping[str, Any], but: Sequence[str]) -> str:
    """A hash of settings as they are in a JSON file, except those named."""
    kept = {name: value for name, value in settings.items() if name not in but}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _folder_of(name_or_path: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """Where the files of a model are on this machine."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        found = cached_file(name_or_path, "config.json", revision=revision, cache_dir=cache_dir, local_files_only=True)
        return Path(found).parent
    except (OSError, TypeError):
        return None
