"""The keys of a configuration: the fields of a dataclass, those of nested ones joined by dots.

A configuration is a frozen dataclass whose docstring explains each field under "Args:". From it
come the help text and the search for the key that a misspelt one is nearest to.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Args:
        name: Full name, such as "visibilities.pixel_scale".
        type: Its type, as the code spells it.
        text: What it means.
        default: Its default; `MISSING` where it has to be given.
        section: The dataclass of a section, None for a single value.
    """

    name: str
    type: str
    text: str
    default: Any
    section: type | None

    @property
    def flag(self) -> bool:
        """Whether the bare name on the command line means true."""
        return self.type == "bool"

    @property
    def several(self) -> bool:
        """Whether the value is a list of any length, which the command line may join by commas."""
        return self.type.endswith(", ...]")


def keys(config: type, prefix: str = "") -> Iterator[Key]:
    """All keys of a configuration, each section followed by its own keys."""
    hints, texts = typing.get_type_hints(config), explained(config)
    for f in fields(config):
        section = _dataclass(hints[f.name])
        default = f.default if f.default_factory is MISSING else f.default_factory()
        spelt = f.type.__name__ if isinstance(f.type, type) else str(f.type)
        yield Key(
            prefix + f.name, spelt.removesuffix(" | None"), texts.get(f.name, ""), default, section
        )
        if section is not None:
            yield from keys(section, f"{prefix}{f.name}.")


def _dataclass(hint: Any) -> type | None:
    """The dataclass that a type hint names, by itself or as `X | None`."""
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if optional else (hint,)
    return next((h for h in options if isinstance(h, type) and is_dataclass(h)), None)


def explained(config: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it extends say of each field under "Args:"."""
    blocks = (
        inspect.getdoc(kind).partition("\nArgs:\n")[2].partition("\n\n")[0]
        for kind in reversed(config.__mro__)
        if is_dataclass(kind)
    )
    entries = (
        entry
        for block in blocks
        for entry in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE)
    )
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def summary(config: type) -> str:
    """First sentence of the docstring, on one line."""
    return " ".join(inspect.getdoc(config).partition("\n\n")[0].split())


def flattened(given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the keys in a nested mapping."""
    for name, value in given.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")


def check_known(given: list[str], config: type) -> None:
    """Refuse keys that the configuration does not have.

    Raises:
        ValueError: With the nearest key there is.
    """
    known = [key.name for key in keys(config)]
    for name in given:
        if name in known:
            continue
        section, _, leaf = name.rpartition(".")
        where = f"{section}: " if section else ""
        raise ValueError(f"{where}unknown key {leaf!r}; did you mean {_nearest(name, known)!r}?")


def _nearest(name: str, known: list[str]) -> str:
    """The closest key of the section, a key of that name in another, or the closest of all."""
    section, _, leaf = name.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(leaf, siblings, n=1)
    near = near or [k for k in known if k.rpartition(".")[2] == leaf]
    return (near or difflib.get_close_matches(name, known, n=1, cutoff=0.0))[0]
