"""The strict command line: unknown flags stop the run, and the nearest known one is named."""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from medicalgpt.args import help_texts
from medicalgpt.encodings import decode_text
from medicalgpt.errors import UserError, fail
from medicalgpt.logs import notice, world_size
from medicalgpt.refusals import (
    ACCEPTED,
    ANY,
    COMMA_LISTS,
    COMMA_SEPARATED,
    CPU_ONLY,
    IMPLIES,
    OLD_VALUES,
    QUOTIENTS,
    RENAMED,
    RENAMED_VALUES,
    SUMS,
    for_program,
    refused_in,
)

import yaml

# Flags whose values are not shown, and whose variables the servers read themselves.
SECRETS = {"api_key", "auth"}


@dataclasses.dataclass
class Flag:
    """A flag as it was given.

    Attributes:
        name: without its dashes.
        values: the words after it; with `--name=value`, one.
        origin: file and line, if it is in a `--config` file; the variable, if it is from the environment.
    """

    name: str
    values: list[str]
    equals: bool
    origin: str

    def __str__(self) -> str:
        values = ["***"] if self.plain in SECRETS and self.values else self.values
        return " ".join([f"--{self.name}", *values])

    @property
    def plain(self) -> str:
        return self.name.replace("-", "_")

    @property
    def value(self) -> str:
        """The first value, as switches and choices are compared."""
        return self.values[0].lower() if self.values else "true"

    @property
    def tokens(self) -> list[str]:
        return [f"--{self.name}={self.values[0]}"] if self.equals else [f"--{self.name}", *self.values]


class Problem(Exception):
    """A flag that cannot be used, with the reason."""


class StrictParser:
    """`HfArgumentParser` with YAML files, old spellings, and no silent guesses.

    All unknown names are reported in one message, each with the nearest known flag; there are no abbreviations. Flags
    that ask for what happens anyway are accepted with a notice (see refusals.py).

    Args:
        classes: dataclasses whose fields become flags.
        description: text shown above the flags by `--help`.
        program: file name of the program, which decides what is refused and what is accepted with a notice.
        env_prefix: variables that begin with it are flags too, below the command line and `--config`; None for none.
    """

    def __init__(
        self,
        *classes: type,
        description: str | None = None,
        program: str | None = None,
        env_prefix: str | None = None,
    ):
        from argparse import SUPPRESS, RawDescriptionHelpFormatter

        from transformers import HfArgumentParser
        from transformers.hf_argparser import string_to_bool

        self.parser = HfArgumentParser(
            classes, allow_abbrev=False, description=description, formatter_class=RawDescriptionHelpFormatter
        )
        self.parser.error = self._fail
        self.unused = refused_in(program)
        self.accepted = for_program(ACCEPTED, program)
        self.sums = for_program(SUMS, program)
        self.quotients = for_program(QUOTIENTS, program)
        self.program = program
        self.env_prefix = env_prefix
        self.parser.add_argument("--config", help="YAML file of flags; the command line takes precedence.")
        help_of = {name: text for cls in classes for name, text in help_texts(cls).items()}
        for action in self.parser._actions:
            action.help = help_of.get(action.dest, action.help)
            if action.dest in self.unused or self.accepted.get(action.dest, ((),))[0] is ANY:
                action.help = SUPPRESS
            if action.type is string_to_bool and action.nargs is None:
                # Switches whose default is None (--bf16) are on when given without a value, like all others.
                action.nargs, action.const = "?", True
        self.dest_of = {
            option.lstrip("-"): action.dest
            for option, action in self.parser._option_string_actions.items()
            if option.startswith("--")
        }
        self.notices: list[str] = []
        self.visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        # What is left to be decided when all flags are known: {name: flag}.
        self.implied: dict[str, Flag] = {}
        self.old_limits: dict[str, Flag] = {}

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance of each dataclass. Exits with code 2 on any problem, naming all of them.

        Each instance gets an attribute `given`, the set of field names that the user set.
        """
        argv = list(argv)
        if not {"-h", "--help"}.isdisjoint(argv):
            self.parser.print_help()
            sys.exit(0)
        problems: list[str] = []
        tokens: list[str] = []
        given: dict[str, Flag] = {}
        for part, origins in (self._read_environment(), *self._split_config(argv)):
            seen: dict[str, tuple[Flag, Flag]] = {}
            stray, flags = _group(part, origins)
            tokens += stray
            for typed in flags:
                try:
                    flag = self._translate(typed)
                    if flag and not self._repeats(typed, flag, seen):
                        tokens += flag.tokens
                except Problem as problem:
                    problems.append(f"{typed.origin}{problem}")
            given.update({dest: flag for dest, (_, flag) in seen.items()})
        try:
            for dest, value in self._derived(given).items():
                given[dest] = Flag(dest, [value], True, "")
                tokens += given[dest].tokens
        except Problem as problem:
            problems.append(str(problem))
        if problems:
            self._fail("\n  ".join(dict.fromkeys(problems)))
        namespace = vars(self.parser.parse_args(tokens))
        namespace.pop("config", None)
        groups = tuple(self._build(cls, namespace, set(given)) for cls in self.parser.dataclass_types)
        for text in dict.fromkeys(
            [*self.notices, *(text for group in groups for text in getattr(group, "notices", ()))]
        ):
            notice(text)
        return groups

    def _translate(self, flag: Flag) -> Flag | None:
        """The flag with its current name and value; None if nothing is left of it.

        Raises:
            Problem: it is unknown, or has no effect in this program.
        """
        if self._is_accepted(flag):
            return None
        plain = flag.plain
        if flag.value in IMPLIES.get(plain, {}) and IMPLIES[plain][flag.value][0] in self.dest_of:
            self.implied[plain] = flag
            return None
        target = plain if plain in self.unused else self.dest_of.get(flag.name)
        if target in self.unused:
            raise Problem(f"--{flag.name} has no effect in this program. {self.unused[target]}")
        if plain in RENAMED_VALUES and (moved := self._renamed_value(flag)):
            return moved
        old = RENAMED.get(plain, ())
        if flag.name not in self.dest_of:
            for new in (old,) if isinstance(old, str) else old:
                if new in self.dest_of:
                    return self._translate(dataclasses.replace(flag, name=new))
            if plain in self.quotients or any(plain in parts for parts in self.sums.values()):
                self.old_limits[plain] = flag
                return None
            raise Problem(f"unknown flag --{flag.name}: {self.hint(plain)}")
        return self._with_current_values(flag)

    def _is_accepted(self, flag: Flag) -> bool:
        """Whether nothing is left to do for a flag; notes the reason. Hides the GPUs if it asks for that."""
        dest = self.dest_of.get(flag.name, flag.plain)
        values, reason = self.accepted.get(dest if flag.plain == f"no_{dest}" else flag.plain, ((), ""))
        if values is ANY or self._setting(flag) in values:
            self.notices.append(f"{flag.origin}{flag} is not needed. {reason}")
            return True
        if flag.plain not in CPU_ONLY or flag.plain in self.unused or flag.name in self.dest_of:
            return False
        if "use_cpu" in self.dest_of or self.program is None:
            return False
        value = flag.values[0].lower() if flag.values else "true"
        if value in CPU_ONLY[flag.plain]:
            _hide_gpus(flag)
            self.notices.append(f"{flag.origin}{flag}: computing on the CPU.")
            return True
        if value == "false" or (flag.plain == "gpus" and value in ("0", self.visible_gpus)):
            self.notices.append(f"{flag.origin}{flag} is not needed. The first visible GPU is used.")
            return True
        gpu = value.removeprefix("cuda:")
        raise Problem(f"--{flag.name} is not needed. Choose a GPU with CUDA_VISIBLE_DEVICES={gpu} before the command.")

    def _renamed_value(self, flag: Flag) -> Flag | None:
        """The flag that a value of an old flag has become; None if this program has none of those flags."""
        values = RENAMED_VALUES[flag.plain]
        if flag.name in self.dest_of or not any(new in self.dest_of for new, _ in values.values()):
            return None
        if not flag.values or flag.value not in values:
            new = "; ".join(f"--{flag.name} {old} is --{new} {value}" for old, (new, value) in values.items())
            raise Problem(f"--{flag} is no longer a flag: {new}.".replace("----", "--"))
        new, value = values[flag.value]
        return Flag(new, [value], flag.equals, flag.origin)

    def _with_current_values(self, flag: Flag) -> Flag | None:
        dest = self.dest_of[flag.name]
        old_values = OLD_VALUES.get(dest, {})
        if flag.values and flag.value in old_values:
            new = old_values[flag.value]
            return dataclasses.replace(flag, values=[new]) if new is not None else None
        if flag.plain in COMMA_SEPARATED:
            return dataclasses.replace(
                flag, values=[part for value in flag.values for part in value.split(",") if part]
            )
        if len(flag.values) > 1 and dest in COMMA_LISTS:
            return dataclasses.replace(flag, values=[",".join(value.strip(",") for value in flag.values)])
        return flag

    def _repeats(self, typed: Flag, flag: Flag, seen: dict[str, tuple[Flag, Flag]]) -> bool:
        """Whether another spelling has set the same value already.

        Raises:
            Problem: it has set another value. A command line may repeat a flag, the last one wins; in a file a second
                one is a mistake.
        """
        dest = self.dest_of[flag.name]
        if dest in seen:
            earlier, earlier_flag = seen[dest]
            if earlier.name != typed.name and self._setting(earlier_flag) == self._setting(flag):
                self.notices.append(f"{typed.origin}--{typed.name} and --{earlier.name} name the same thing.")
                return True
            if earlier.name != typed.name or typed.origin:
                raise Problem(f"--{typed.name} and --{earlier.name} set the same thing; keep one of them.")
        seen[dest] = (typed, flag)
        return False

    def _setting(self, flag: Flag) -> str:
        """What a flag sets its field to, as text."""
        return "false" if flag.plain == f"no_{self.dest_of.get(flag.name)}" else flag.value

    def _derived(self, given: Mapping[str, Flag]) -> dict[str, str]:
        """Values of flags that follow from others: defaults set by old switches, sums and quotients of old numbers.

        Raises:
            Problem: something is missing for a sum, or it contradicts a flag.
        """
        found = {}
        for plain, flag in self.implied.items():
            new, value = IMPLIES[plain][flag.value]
            if new not in given:
                found[new] = value
                self.notices.append(f"{flag} is now --{new} {value}.")
            else:
                self.notices.append(f"{flag} is not needed. --{new} is given.")
        for total, parts in self.sums.items():
            if any(part in self.old_limits for part in parts):
                found[total] = self._sum(total, parts, given)
        for old, (new, factors, all_processes) in self.quotients.items():
            if old in self.old_limits:
                found |= self._quotient(self.old_limits[old], new, factors, all_processes, given | found)
        return found

    def _sum(self, total: str, parts: Sequence[str], given: Mapping[str, Flag]) -> str:
        flags = [self.old_limits.get(part) or given.get(part) for part in parts]
        texts = [
            flag.value if flag else str(self.parser.get_default(part)) for flag, part in zip(flags, parts, strict=True)
        ]
        named = " and ".join(str(flag) for flag in flags if flag)
        if not all(text.isdecimal() and int(text) for text in texts):
            raise Problem(f"{named}: --{total} is the sum of --{' and --'.join(parts)}; give both, at least 1 each.")
        value = str(sum(map(int, texts)))
        if total in given and given[total].value != value:
            raise Problem(f"{named} and {given[total]} set the same thing; keep --{total}.")
        self.notices.append(f"{named}: the limit is now of both together, --{total} {value}.")
        return value

    def _quotient(
        self,
        flag: Flag,
        new: str,
        factors: Mapping[str, int | None],
        all_processes: bool,
        given: Mapping[str, Flag | str],
    ) -> dict[str, str]:
        """Raises Problem if the product cannot be that number, or `new` is given as well."""
        found = {}
        product = world_size() if all_processes else 1
        for factor, default in factors.items():
            setting = given.get(factor)
            if setting is None and default is not None:
                found[factor] = setting = str(default)
            text = setting.value if isinstance(setting, Flag) else str(setting or self.parser.get_default(factor))
            product *= int(text) if text.isdecimal() else 0
        if new in given:
            raise Problem(f"{flag} and --{new} set the same thing; keep --{new}.")
        if not (flag.value.isdecimal() and int(flag.value) and product) or (
            int(flag.value) % product and not all_processes
        ):
            raise Problem(f"{flag} must be a multiple of {product}, the product of --{' and --'.join(factors)}.")
        found[new] = str(-(-int(flag.value) // product))
        self.notices.append(f"{flag} is now " + " ".join(f"--{name} {value}" for name, value in found.items()) + ".")
        return found

    def hint(self, plain: str) -> str:
        """Which known flag was meant, if it is a misspelling or the beginning of one and of no other."""
        known = [option for option in self.dest_of if option.replace("-", "_") == option and option not in self.unused]
        near = [
            option for option in difflib.get_close_matches(plain, known, n=5, cutoff=0.6) if _misspelt(plain, option)
        ]
        # Only within a word: --device is not a part of --device_map.
        longer = [flag for flag in known if len(plain) > 3 and re.fullmatch(f"{re.escape(plain)}[^_]+", flag)]
        if near or len(longer) == 1:
            return f"did you mean --{(near or longer)[0]}?"
        return "see --help for all flags."

    def _build(self, cls: type, namespace: dict[str, Any], given: set[str]) -> Any:
        names = [f.name for f in dataclasses.fields(cls) if f.init]
        try:
            instance = cls(**{name: namespace[name] for name in names})
        except (ValueError, TypeError, ImportError, RuntimeError, OSError, LookupError) as error:
            self._fail(str(error))
        instance.given = frozenset(given.intersection(names))
        return instance

    def _split_config(self, argv: list[str]) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
        """Separate `--config FILE` from the command line; both as (tokens, the origin of each token)."""
        rest: list[str] = []
        path: str | None = None
        index = 0
        while index < len(argv):
            if argv[index] == "--config" and index + 1 < len(argv):
                found, index = argv[index + 1], index + 2
            elif argv[index].startswith("--config="):
                found, index = argv[index].partition("=")[2], index + 1
            else:
                rest.append(argv[index])
                index += 1
                continue
            if path:
                self._fail(f"--config is given twice ({path} and {found}); put all flags into one file.")
            path = found
        return self._read_yaml(path) if path else ([], []), (rest, [""] * len(rest))

    def _read_environment(self) -> tuple[list[str], list[str]]:
        """Flags from variables, each with its origin; those of other programs are noted."""
        tokens: list[str] = []
        origins: list[str] = []
        for variable, value in sorted(os.environ.items()) if self.env_prefix else ():
            name = variable.removeprefix(self.env_prefix).lower()
            # An empty one is not set: that is what Compose makes of a variable that does not exist.
            if not variable.startswith(self.env_prefix) or name in SECRETS or not value:
                continue
            if name not in self.dest_of or name in ("config", "help"):
                self.notices.append(f"{variable} is not a setting of this program: {self.hint(name)}")
                continue
            tokens.append(f"--{name}={value}")
            origins.append(f"{variable}: ")
        return tokens, origins

    def _read_yaml(self, path: str) -> tuple[list[str], list[str]]:
        try:
            with open(path, "rb") as file:
                text, guess = decode_text(file.read(), f"--config {path}", flag=None)
            if guess:
                notice(f"{path} {guess}")
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            # A mapping is taken key by key, since a dict would hide duplicate keys.
            entries = root.value if isinstance(root, yaml.MappingNode) else []
            values = [loader.construct_object(value, deep=True) for _, value in entries]
        except OSError as error:
            self._fail(f"--config {path}: {error.strerror or error}. Give the path of a YAML file.")
        except UserError as error:
            self._fail(str(error))
        except yaml.YAMLError as error:
            self._fail(f"--config {path} is not valid YAML: {error}")
        if root is not None and not isinstance(root, yaml.MappingNode):
            self._fail(f"--config {path} must hold `flag: value` lines, it holds a {root.id}.")
        tokens: list[str] = []
        origins: list[str] = []
        for (key_node, _), value in zip(entries, values, strict=True):
            key, origin = key_node.value, f"{path}:{key_node.start_mark.line + 1}: "
            if key == "config":
                self._fail(f"{origin}a --config file cannot name another one; put all flags into one file.")
            if value is None:
                continue
            action = self.parser._option_string_actions.get(f"--{key}")
            if isinstance(value, list) and action is not None and action.nargs == "+":
                parts = [f"--{key}", *map(_as_token, value)]
            else:
                # With "=", for a value may begin with a dash.
                parts = [f"--{key}={_as_token(value)}"]
            tokens += parts
            origins += [origin] * len(parts)
        return tokens, origins

    def _fail(self, message: str) -> NoReturn:
        fail(f"{message}\n  all flags: python {self.parser.prog} --help", code=2)


def parse_args(
    *classes: type,
    description: str | None = None,
    program: str | None = None,
    argv: Sequence[str] | None = None,
    env_prefix: str | None = None,
) -> tuple[Any, ...]:
    """Parse the command line into one instance of each dataclass.

    Args:
        classes: dataclasses; field metadata may hold `help`, `choices`, `aliases`.
        description: shown by `--help`.
        program: file name of the program, as in refusals.py: which flags have no effect in it, and why.
        argv: arguments without the program's name; the command line by default.
        env_prefix: of variables that are flags too, `MEDICALGPT_` in servers: below `--config` and the command line.

    Raises:
        SystemExit: code 2 after a message that names every unknown, unused or duplicate flag.
    """
    return StrictParser(*classes, description=description, program=program, env_prefix=env_prefix).parse(
        sys.argv[1:] if argv is None else argv
    )


def _group(tokens: Sequence[str], origins: Sequence[str]) -> tuple[list[str], list[Flag]]:
    """Words before the first flag, and the flags with the words that follow each."""
    stray: list[str] = []
    flags: list[Flag] = []
    for token, origin in zip(tokens, origins, strict=True):
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            flags.append(Flag(name, [value] if equals else [], bool(equals), origin))
        elif flags and not flags[-1].equals:
            flags[-1].values.append(token)
        else:
            stray.append(token)
    return stray, flags


def _misspelt(given: str, flag: str) -> bool:
    """Whether a name is a flag with a mistake in it, not the name of something else: word by word they are alike."""
    words, known = given.split("_"), flag.split("_")
    if len(words) != len(known):
        return difflib.SequenceMatcher(None, given.replace("_", ""), flag.replace("_", "")).ratio() > 0.95
    # Where two words agree, the third may be a short one with a mistake.
    agree = sum(map(str.__eq__, words, known))
    shortest, alike = (3, 0.79) if agree > 1 else (4, 0.82)
    return all(
        word == other
        # Two letters in the wrong order.
        or (len(word) >= shortest and sorted(word) == sorted(other))
        or (len(word) > 2 and other.startswith(word))
        or (
            re.sub(r"\D", "", word) == re.sub(r"\D", "", other)
            and difflib.SequenceMatcher(None, word, other).ratio() > alike
        )
        for word, other in zip(words, known, strict=True)
    )


def _hide_gpus(flag: Flag) -> None:
    """Raises Problem if the GPUs are in use already."""
    import torch

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if torch.cuda.is_available():
        raise Problem(f"{flag} comes too late to hide the GPUs. Put CUDA_VISIBLE_DEVICES= before the command.")


def _as_token(value: Any) -> str:
    if isinstance(value, dict):
        import json

        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
