"""From the command line and YAML files to a configuration: jsonargparse, and errors in one line.

Values come from the defaults of the dataclass, then from the files given by --config in their
order, then from the command line.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from scoreinv.cli.keys import Key, check_known, flattened, keys, summary

WIDTH, COLUMN = 96, 26
GENERAL = {
    "--config FILE": "YAML file with any of the keys below; the command line overrides it.",
    "--print_config": "Print the resolved configuration as YAML and stop.",
    "--debug": "Show where in the code an error comes from.",
    "--help": "Show this text.",
}


def parse(config: type, arguments: Sequence[str], command: str) -> Any:
    """The configuration that the arguments describe, an instance of the dataclass `config`.

    Raises:
        ValueError: Unknown key, missing key or wrong type.
        OSError: A configuration file cannot be read.
    """
    arguments = _spelt_out(config, arguments)
    options = dict(_options(arguments))
    check_known([name for name in options if name not in ("config", "print_config")], config)
    for path in _config_files(arguments):
        _check_file(path, config)
    parser = ArgumentParser(prog=command, exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config)
    try:
        values = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise ValueError(_in_one_line(str(error), config)) from error
    except ValueError as error:
        # an optional section says what is wrong with its values among what the other types would have been
        own = re.search(
            r"Errors:\n\s*- (.*?)\n\s*- Expected a <class 'NoneType'>", str(error), re.DOTALL
        )
        if own is None:
            raise
        raise ValueError(own[1]) from error
    return config(**{f.name: values[f.name] for f in fields(config)})


def _spelt_out(config: type, arguments: Sequence[str]) -> list[str]:
    """Arguments with _ for - in names, `=true` behind bare flags, brackets around lists, and a name for a bare FILE."""
    known = {key.name: key for key in keys(config)}
    out = list(arguments)
    for i, word in enumerate(out):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        alone = not equals and (i + 1 == len(out) or out[i + 1].startswith("--"))
        flag = alone and name in known and known[name].flag
        several = name in known and known[name].several
        if several and equals:
            value = _bracketed(value)
        elif several and not alone:
            out[i + 1] = _bracketed(out[i + 1])
        out[i] = f"--{name}=true" if flag else f"--{name}{equals}{value}"
    if out and not out[0].startswith("-"):
        first = next((name for name in ("path", "what") if name in known), "config")
        out.insert(0, f"--{first}")
    return out


def _bracketed(value: str) -> str:
    return value if value.startswith("[") else f"[{value}]"


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of every option; the value is the next word, or what follows "="."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name, value if equals else following


def _config_files(arguments: Sequence[str]) -> list[Path]:
    return [Path(value) for name, value in _options(arguments) if name == "config"]


class OnceOnly(yaml.SafeLoader):
    """YAML in which a key stands once in its section: of two values PyYAML takes the last, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{name} is given twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _check_file(path: Path, config: type) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"the configuration {path} is a folder, expected a YAML file")
    if not path.is_file():
        raise FileNotFoundError(f"the configuration {path} does not exist")
    try:
        content = yaml.load(path.read_text(), OnceOnly)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no keys, expected lines such as `n: 64`")
    try:
        check_known(list(flattened(content)), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _in_one_line(message: str, config: type) -> str:
    """What jsonargparse has to say, as "KEY is VALUE, expected TYPE"."""
    name = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    missing = re.search(r"arguments are required: (.*)", message)
    if missing:
        where = f"{name}: " if name else ""
        return f"{where}missing: {missing[1]}; give it by --config FILE or --KEY VALUE, see --help"
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    known = {key.name: key for key in keys(config)}
    if name not in known or not values:
        return " ".join(message.split())
    return f"{name} is {values[0]}, expected {_expected(known[name])}"


def _expected(key: Key) -> str:
    if key.section is None:
        return key.type
    return f"the keys {', '.join(f.name for f in fields(key.section))}"


def help_text(config: type, command: str, about: str) -> str:
    """Every key of a command, with its type, its default and what it means."""
    blocks = [
        [f"usage: {command} [--config FILE] [--KEY VALUE ...] [--SECTION.KEY VALUE ...]"],
        textwrap.wrap(about, WIDTH),
        [line for item in GENERAL.items() for line in _entry(*item)],
        _section("", config),
        *(
            [*textwrap.wrap(f"{key.name}: {_about(key)}", WIDTH), *_section(key.name, config)]
            for key in keys(config)
            if key.section is not None
        ),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _about(key: Key) -> str:
    needed = "required" if key.default is MISSING else "optional"
    return f"{key.text or summary(key.section)} (section, {needed})"


def _section(name: str, config: type) -> list[str]:
    """Lines on the single values of one section, "" for the top."""
    inside = [k for k in keys(config) if k.section is None and k.name.rpartition(".")[0] == name]
    return [line for key in inside for line in _entry(f"--{key.name}", _described(key))]


def _described(key: Key) -> str:
    return f"{key.text} ({key.type}, {_default(key.default)})".lstrip()


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    return "optional" if value is None else f"default {_as_yaml(value)}"


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).partition("\n")[0]


def _entry(name: str, text: str) -> list[str]:
    lines = [" " * COLUMN + line for line in textwrap.wrap(text, WIDTH - COLUMN)]
    name = f"  {name}"
    if len(name) < COLUMN - 1:
        return [name.ljust(COLUMN) + lines[0].lstrip(), *lines[1:]]
    return [name, *lines]
