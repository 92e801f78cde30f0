"""The command line: `scoreinv COMMAND --config FILE.yaml --KEY VALUE ...`.

A command is a function of one configuration, a frozen dataclass with a docstring; its keys, its
help and the search for misspelt keys come from there. What a user can mend ends in one line on
standard error and exit status 2, an interruption in status 130, a measured target that was missed
in status 1.
"""

from __future__ import annotations

import difflib
import os
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from scoreinv.cli.bench import bench
from scoreinv.cli.coverage import coverage
from scoreinv.cli.finetune import finetune
from scoreinv.cli.inspect import inspect
from scoreinv.cli.keys import summary
from scoreinv.cli.npe import npe
from scoreinv.cli.parse import help_text, parse
from scoreinv.cli.priors import priors
from scoreinv.cli.sample import sample
from scoreinv.cli.train import train

COMMANDS: dict[str, Callable[[typing.Any], int | None]] = {
    "sample": sample,
    "coverage": coverage,
    "finetune": finetune,
    "train": train,
    "npe": npe,
    "bench": bench,
    "priors": priors,
    "inspect": inspect,
}
MISTAKES = (ValueError, FloatingPointError, OSError)
FAILED, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    status = 0
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has seen enough (`scoreinv priors | head`); what is left must not be flushed into the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MISTAKES as error:
        if debug:
            raise
        return _end(FAILED, f"error: {error}")
    except KeyboardInterrupt as stop:
        return _end(INTERRUPTED, f"interrupted{': ' if stop.args else ''}{stop}")
    return status


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(_version())
        return 0
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown command {name!r}; did you mean {near!r}?")
    command = COMMANDS[name]
    config = typing.get_type_hints(command)["config"]
    if "--help" in rest or "-h" in rest:
        print(help_text(config, f"scoreinv {name}", summary(command)))
        return 0
    return command(parse(config, rest, f"scoreinv {name}")) or 0


def _overview() -> str:
    lines = [f"  {name:<12}{summary(command)}" for name, command in COMMANDS.items()]
    usage = "usage: scoreinv COMMAND [--config FILE.yaml] [--KEY VALUE ...]"
    more = "`scoreinv COMMAND --help` explains every key of a command."
    return "\n".join([usage, "", *lines, "", more])


def _version() -> str:
    try:
        return f"scoreinv {version('scoreinv')}"
    except PackageNotFoundError:
        return "scoreinv (not installed)"


def _end(status: int, message: str) -> int:
    print(f"scoreinv: {' '.join(message.split())}", file=sys.stderr)
    return status
