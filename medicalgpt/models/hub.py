"""Find a checkpoint: a folder or a hub name, an adapter and its base, and the base's fingerprint."""

import functools
import hashlib
import json
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError

from huggingface_hub import constants
from loguru import logger
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers import __version__ as transformers_version

ADAPTER_CONFIG = "adapter_config.json"
RUN_FILE = "run.json"
# Names of the head of a model for sequences; peft trains and saves it in full beside an adapter.
HEADS = ("score", "classifier")


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or does not fit the one it is used with."""


def resolve_checkpoint(name_or_path: str) -> tuple[str, str | None]:
    """(base model, adapter or None): the folder of an adapter stands for its base with the adapter on it.

    Raises:
        CheckpointError: a local path that is no checkpoint, or an adapter whose base is not there.
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
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name its base model.")
        if not Path(base).is_dir():
            # A path below the folder where it was trained, from which the adapter may be looked at from elsewhere.
            found = next((parent / base for parent in folder.resolve().parents if (parent / base).is_dir()), None)
            if found:
                logger.info(f"base of the adapter: {found}")
                return str(found), name_or_path
        if _looks_local(base) and not Path(base).is_dir():
            raise CheckpointError(
                f"the adapter {folder} was trained on {base}, which is not there (looked in {Path.cwd()}). "
                "Run from the folder where it was trained, or mend base_model_name_or_path in "
                f"{folder / ADAPTER_CONFIG}."
            )
        return base, name_or_path
    if not (folder / "config.json").is_file():
        inner = sorted(child.parent for child in folder.glob("*/config.json"))
        hint = f" Did you mean {inner[0]}?" if inner else ""
        raise CheckpointError(f"{folder} holds neither config.json nor {ADAPTER_CONFIG}, so it is no checkpoint.{hint}")
    return name_or_path, None


def _looks_local(name_or_path: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path) is None


def fetch(name_or_path: str, hub: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """A local folder stays; a name on ModelScope is downloaded; a name on Hugging Face is left to transformers.

    Raises:
        CheckpointError: ModelScope was asked for and its package or the download is missing.
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
        raise CheckpointError(f"ModelScope could not give {name_or_path}: {error}") from error


@functools.cache
def _hub_is_reachable() -> bool:
    """Whether a connection to the hub can be opened at all; the hub's own client tries for a minute to find out."""
    if constants.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
    except OSError as error:
        logger.warning(f"{constants.ENDPOINT} cannot be reached ({error}); looking among earlier downloads only")
        return False
    return True


def load_pretrained(loader: Any, name_or_path: str, **options: Any) -> Any:
    if not Path(name_or_path).is_dir() and not _hub_is_reachable():
        options["local_files_only"] = True
    try:
        # Unset, it would ask on a terminal whether to run the code of a checkpoint.
        return loader.from_pretrained(name_or_path, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{name_or_path} brings code of its own, and code of a checkpoint is never run here. Use one that "
                "transformers itself knows (often with -hf in its name); docs/models.md lists the families."
            ) from error
        if unknown := re.search(r"model type `(\S+)` but Transformers does not recognize", str(error)):
            raise CheckpointError(
                f"{name_or_path} is of the type {unknown[1]}, which transformers {transformers_version} does not know. "
                "docs/models.md lists the families; a newer one may need a newer transformers."
            ) from error
        if Path(name_or_path).is_dir():
            raise CheckpointError(f"{name_or_path} could not be loaded: {error}") from error
        raise CheckpointError(
            f"{name_or_path} is neither a folder here ({Path.cwd()}) nor could it be had from {constants.ENDPOINT}: "
            f"{str(error).splitlines()[0]}\n"
            "Check the name; offline, give the path of a downloaded folder; behind a wall, set "
            "HF_ENDPOINT=https://hf-mirror.com or use --hub modelscope."
        ) from error


def check_base(adapter_path: str, base: str) -> None:
    """Compare the base that an adapter was trained on with `base`, by the fingerprints of their weights.

    Raises:
        CheckpointError: they differ. An adapter without run.json (not trained here) cannot be checked, and says so.
    """
    recorded = _recorded_base(adapter_path)
    if not recorded.get("fingerprint"):
        logger.warning(f"{adapter_path} does not record its base's weights; whether {base} is the right one is unknown")
        return
    found = fingerprint(base)
    if found and found != recorded["fingerprint"]:
        raise CheckpointError(
            f"the adapter {adapter_path} was trained on {recorded['name']} (weights {recorded['fingerprint'][:12]}), "
            f"but {base} has other weights ({found[:12]}). Give the base that it was trained on."
        )


def _recorded_base(adapter_path: str) -> dict[str, Any]:
    for folder in (Path(adapter_path), Path(adapter_path).parent):
        if (folder / RUN_FILE).is_file():
            return json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("base") or {}
    return {}


def recorded_positions(adapter_path: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs so that a base has the positions which the adapter was trained with."""
    rope = _recorded_base(adapter_path).get("rope_parameters") if adapter_path else None
    return {"rope_parameters": rope} if rope else {}


def fingerprint(name_or_path: str) -> str | None:
    """A hash that tells one set of weights from another, in well under a second even for large models.

    It covers each tensor's name, type, shape and 3 x 64 bytes of it, whatever the sharding. None if the weights are
    not in safetensors files on this machine.

    Raises:
        CheckpointError: a file that is no safetensors file, or is cut before the end of its header.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            folder = Path(cached_file(name_or_path, "config.json", local_files_only=True)).parent
        except (OSError, TypeError):
            return None
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("adapter_"):
            continue
        with open(path, "rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(header_length) if header_length <= path.stat().st_size else b"")
            except ValueError as error:
                raise CheckpointError(f"{path} is damaged or incomplete; get the file again.") from error
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{name} {entry['dtype']} {entry['shape']}".encode())
                for at in (start, (start + end) // 2, max(start, end - 64)):
                    file.seek(8 + header_length + at)
                    digest.update(file.read(min(64, end - at)))
                tensors[name] = digest.digest()
    if not tensors:
        return None
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()


def config_of(name_or_path: str, **options: Any) -> Any:
    """The configuration of a checkpoint, or of an adapter's base."""
    base, _ = resolve_checkpoint(name_or_path)
    return load_pretrained(AutoConfig, base, **options)
