"""What tests of pages and scripts share: the code blocks of a page, and a program run as far as its command line."""

import argparse
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import patch


class Parsed(BaseException):
    """Ends a program once its command line has been read; no program can catch it by accident."""


def start(program: Path, arguments: list[str], parse_args) -> None:
    """Run a program as `__main__` up to its first call of argparse, which `parse_args(parser, args)` answers."""

    def replaced(parser, args=None, namespace=None):
        parse_args(parser, args)
        raise Parsed

    with (
        patch.object(argparse.ArgumentParser, "parse_args", replaced),
        patch.object(sys, "argv", [program.name, *arguments]),
    ):
        runpy.run_path(str(program), run_name="__main__")


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
