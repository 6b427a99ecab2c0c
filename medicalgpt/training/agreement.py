"""All processes of a run must have the same flags, code, data and model: found out at the start, not by a wrong result.

A host with another copy of a file, or an older checkout, would train other rows than the rest, or wait for ever.
"""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from medicalgpt.code_version import code_version
from medicalgpt.errors import UserError

from accelerate.utils import gather_object

# Of the arguments, those that may differ.
OWN_FLAGS = frozenset({"local_rank", "_n_gpu", "hub_token"})
SHOWN_DIFFERENCES = 2


def require_agreement(facts: Mapping[str, Any], remedy: str) -> None:
    """Compare what this process has with what the first one has. Call it on every process.

    Args:
        facts: values that JSON can hold, by the names that the message gives them; compared one by one.
        remedy: what to do if they differ.

    Raises:
        UserError: on every process, naming the process and the host that differ, and in what.
    """
    own = {"host": socket.gethostname(), "facts": {name: str(value) for name, value in facts.items()}}
    first, *others = gather_object([own])
    differences = []
    for number, other in enumerate(others, start=1):
        for name in dict.fromkeys([*first["facts"], *other["facts"]]):
            here, there = (each["facts"].get(name, "nothing") for each in (first, other))
            if here != there:
                where = f"process {number} on {other['host']}"
                differences.append(
                    f"{name}: {_short(there)} in {where}; {_short(here)} in process 0 on {first['host']}"
                )
    if differences:
        more = f"\n  and {len(differences) - SHOWN_DIFFERENCES} more" if differences[SHOWN_DIFFERENCES:] else ""
        listed = "\n  ".join(differences[:SHOWN_DIFFERENCES])
        raise UserError(f"the processes of this run differ, so nothing was trained. {remedy}\n  {listed}{more}")


def compare_start(record: Mapping[str, Any]) -> None:
    """Compare the flags, the code, the libraries and the checkpoint to resume from. Call it on every process.

    Args:
        record: of the run, as in run.json.

    Raises:
        UserError: see `require_agreement`.
    """
    if record["processes"] == 1:
        return
    flags = {f"--{name}": value for name, value in record["arguments"].items() if name not in OWN_FLAGS}
    code = {"the code of " + record["stage"]: code_version(record["stage"])[:12]}
    more = {"the checkpoint to resume from": record["resumed_from"]}
    require_agreement(flags | code | record["versions"] | more, "Give every process the same command and code.")


def compare_data(entries: Sequence[Mapping[str, Any]]) -> None:
    """Compare the files that were read, and their rows. Call it on every process.

    Args:
        entries: `data` of run.json.

    Raises:
        UserError: see `require_agreement`.
    """
    facts = {
        f"{entry['side']} file {entry['file']}": f"{entry['rows']} rows, {entry['used']} used, "
        f"sha256 {entry['sha256'][:12]}"
        for entry in entries
    }
    require_agreement(facts, "Copy the same files to every host.")


def _short(value: str, limit: int = 80) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"
