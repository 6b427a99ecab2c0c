"""The strict command line: unknown flags stop the run, and the nearest known one is named."""

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from medicalgpt.args import help_texts
from medicalgpt.encodings import decode_text
from medicalgpt.errors import UserError
from medicalgpt.logs import is_main_process
from medicalgpt.refusals import RENAMED, RENAMED_VALUES, refused_in

import yaml


class StrictParser:
    """`HfArgumentParser` with YAML files, old spellings, and no silent guesses.

    All unknown names are reported in one message, each with the nearest known flag; there are no abbreviations.

    Args:
        classes: dataclasses whose fields become flags.
        description: text shown above the flags by `--help`.
        unused: fields without effect in this program, with the reason; they are hidden, and refused if given.
    """

    def __init__(self, *classes: type, description: str | None = None, unused: Mapping[str, str] | None = None):
        from argparse import SUPPRESS, RawDescriptionHelpFormatter

        from transformers import HfArgumentParser
        from transformers.hf_argparser import string_to_bool

        self.parser = HfArgumentParser(
            classes, allow_abbrev=False, description=description, formatter_class=RawDescriptionHelpFormatter
        )
        self.parser.error = self._fail
        self.unused = {**refused_in(), **(unused or {})}
        self.parser.add_argument("--config", help="YAML file of flags; the command line takes precedence.")
        help_of = {name: text for cls in classes for name, text in help_texts(cls).items()}
        for action in self.parser._actions:
            action.help = help_of.get(action.dest, action.help)
            if action.dest in self.unused:
                action.help = SUPPRESS
            if action.type is string_to_bool and action.nargs is None:
                # Switches whose default is None (--bf16) are on when given without a value, like all others.
                action.nargs, action.const = "?", True
        self.dest_of = {
            option.lstrip("-"): action.dest
            for option, action in self.parser._option_string_actions.items()
            if option.startswith("--")
        }

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance of each dataclass. Exits with code 2 on any problem, naming all of them.

        Each instance gets an attribute `given`, the set of field names that the user set.
        """
        argv = list(argv)
        if not {"-h", "--help"}.isdisjoint(argv):
            self.parser.print_help()
            sys.exit(0)
        config_tokens, command_line = self._split_config(argv)
        problems: list[str] = []
        tokens: list[str] = []
        given: dict[str, str] = {}
        for part, origins in (config_tokens, command_line):
            seen_here: dict[str, str] = {}
            for position, token in enumerate(part):
                if not token.startswith("--"):
                    tokens.append(token)
                    continue
                name, equals, value = token[2:].partition("=")
                following = part[position + 1] if position + 1 < len(part) else None
                new, new_value, problem = self._current(name, value if equals else following, origins[position])
                if problem:
                    problems.append(problem)
                    continue
                dest = self.dest_of[new]
                # A command line may repeat a flag, the last one wins; in a file a second one is a mistake.
                if dest in seen_here and (seen_here[dest] != name or origins[position]):
                    problems.append(
                        f"{origins[position]}--{name} and --{seen_here[dest]} set the same thing; keep one of them."
                    )
                seen_here[dest] = name
                tokens.append(f"--{new}={new_value if new_value is not None else value}" if equals else f"--{new}")
                if new_value is not None and not equals and following is not None:
                    part[position + 1] = new_value
            given.update(seen_here)
        if problems:
            self._fail("\n  ".join(dict.fromkeys(problems)))
        namespace = vars(self.parser.parse_args(tokens))
        namespace.pop("config", None)
        return tuple(self._build(cls, namespace, set(given)) for cls in self.parser.dataclass_types)

    def _build(self, cls: type, namespace: dict[str, Any], given: set[str]) -> Any:
        names = [f.name for f in dataclasses.fields(cls) if f.init]
        try:
            instance = cls(**{name: namespace[name] for name in names})
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            self._fail(str(error))
        instance.given = frozenset(given.intersection(names))
        return instance

    def _current(self, name: str, value: str | None, origin: str) -> tuple[str, str | None, str | None]:
        """Return (current name, its value if that changes, problem)."""
        plain = name.replace("-", "_")
        target = plain if plain in self.unused else self.dest_of.get(name)
        if target in self.unused:
            return name, None, f"{origin}--{name} has no effect in this program. {self.unused[target]}"
        if plain in RENAMED_VALUES and RENAMED_VALUES[plain][0] in self.dest_of:
            new, values = RENAMED_VALUES[plain]
            key = "true" if value is None or value.startswith("--") else value.lower()
            if key not in values or value is None or value.startswith("--"):
                return name, None, f"{origin}--{name} needs True or False; it is now --{new} {values['true']}"
            return new, values[key], None
        if RENAMED.get(plain) in self.dest_of:
            return RENAMED[plain], None, None
        if name in self.dest_of:
            return name, None, None
        known = [option for option in self.dest_of if option.replace("-", "_") == option and option not in self.unused]
        near = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
        hint = f"did you mean --{near[0]}?" if near else "see --help for all flags."
        return name, None, f"{origin}unknown flag --{name}: {hint}"

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

    def _read_yaml(self, path: str) -> tuple[list[str], list[str]]:
        try:
            with open(path, "rb") as file:
                text, notice = decode_text(file.read(), f"--config {path}", flag=None)
            if notice and is_main_process():
                print(f"notice: {path} {notice}", file=sys.stderr)
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
        if is_main_process():
            print(f"error: {message}\n  all flags: python {self.parser.prog} --help", file=sys.stderr)
        sys.exit(2)


def parse_args(
    *classes: type,
    description: str | None = None,
    unused: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> tuple[Any, ...]:
    """Parse the command line into one instance of each dataclass.

    Args:
        classes: dataclasses; field metadata may hold `help`, `choices`, `aliases`.
        description: shown by `--help`.
        unused: fields that have no effect in this program, with what to do instead; refused if given.
        argv: arguments without the program's name; the command line by default.

    Raises:
        SystemExit: code 2 after a message that names every unknown, unused or duplicate flag.
    """
    return StrictParser(*classes, description=description, unused=unused).parse(sys.argv[1:] if argv is None else argv)


def _as_token(value: Any) -> str:
    if isinstance(value, dict):
        import json

        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
