"""Settings declared once, as dataclass fields that the command line and the studio both read.

A field made with `option` carries its help text and bounds. `add_options` turns the fields into
flags, `from_namespace` turns parsed flags back into the dataclass, and `command_line` prints the
command that would give the same settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from csm_studio.errors import OptionError

T = TypeVar("T")
_METADATA_KEY = "option"
_METAVARS = {int: "N", float: "X", Path: "PATH"}


@dataclasses.dataclass(frozen=True)
class Option:
    """What a setting is besides its name, type and default.

    Attributes:
        help: One sentence for `--help` and for the tip in the studio.
        minimum: Smallest value allowed (inclusive), or None.
        maximum: Largest value allowed (inclusive), or None.
        above: Value that must be exceeded (exclusive lower bound), or None.
        choices: The values allowed, or None for any.
        flag: The flag's name where it differs from the field's, such as `-o`.
        metavar: The placeholder shown in `--help`.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None
    flag: str | None = None
    metavar: str | None = None


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    flag: str | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a dataclass field that is a setting. Without a default the flag is required."""
    declared = Option(help, minimum, maximum, above, choices, flag, metavar)
    metadata = {_METADATA_KEY: declared}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def describe(field: dataclasses.Field[Any]) -> Option | None:
    """Return the `Option` of a field, or None for a field that is no setting."""
    return field.metadata.get(_METADATA_KEY)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Return a field's long flag, such as `--batch-size`."""
    return "--" + field.name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add one flag to `parser` for each setting of the dataclass `settings`."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        declared = describe(field)
        if declared is None:
            continue
        kind, is_list, _ = _unwrap(hints[field.name])
        default = _default(field)
        flags = [flag_of(field)] if declared.flag is None else [declared.flag, flag_of(field)]
        text = declared.help.replace("%", "%%")
        if default is not dataclasses.MISSING and default is not None and kind is not bool:
            shown = " ".join(map(str, default)) if is_list else default
            text += f" (default: {shown})".replace("%", "%%")
        keywords: dict[str, Any] = {"help": text, "dest": field.name}
        if kind is bool:
            keywords["action"] = "store_true" if not default else argparse.BooleanOptionalAction
            keywords["default"] = default
        else:
            keywords["type"] = kind
            keywords["metavar"] = declared.metavar or _METAVARS.get(kind)
            if declared.choices is not None:
                keywords["choices"] = declared.choices
            if is_list:
                keywords["nargs"] = "+"
                keywords["action"] = _Gather
            if default is dataclasses.MISSING:
                keywords["required"] = True
            else:
                keywords["default"] = default
        parser.add_argument(*flags, **keywords)


class _Gather(argparse.Action):
    """A list's flag given again adds to the list; given once it replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = getattr(namespace, self.dest)
        is_first = given is self.default
        setattr(namespace, self.dest, list(values) if is_first else [*given, *values])


def from_namespace(settings: type[T], namespace: argparse.Namespace) -> T:
    """Build the dataclass from parsed flags and check its bounds.

    Raises:
        OptionError: A value is out of bounds; all such values are listed.
    """
    names = [f.name for f in dataclasses.fields(settings) if describe(f) is not None]  # type: ignore[arg-type]
    instance = settings(**{name: getattr(namespace, name) for name in names})
    check(instance)
    return instance


def check(instance: Any) -> None:
    """Check every setting of a dataclass instance against its declared bounds.

    Raises:
        OptionError: Lists each setting out of bounds with its value and the bound.
    """
    problems: list[str] = []
    for field in dataclasses.fields(instance):
        declared = describe(field)
        value = getattr(instance, field.name)
        if declared is None or value is None:
            continue
        problem = _problem(declared, value)
        if problem:
            problems.append(f"{flag_of(field)} is {value!r}; {problem}.")
    if problems:
        raise OptionError("\n".join(problems))


def command_line(module: str, instance: Any) -> str:
    """Return the shell command that gives these settings, leaving out the defaults."""
    words = ["python", "-m", module]
    for field in dataclasses.fields(instance):
        declared = describe(field)
        value = getattr(instance, field.name)
        if declared is None or value is None or value == _default(field):
            continue
        flag = flag_of(field)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            words.extend([flag, *map(str, value)])
        else:
            words.extend([flag, str(value)])
    return shlex.join(words)


def _problem(declared: Option, value: Any) -> str | None:
    if declared.choices is not None:
        values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
        if any(item not in declared.choices for item in values):
            return f"choose from {', '.join(declared.choices)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "it must be a finite number"
    if declared.minimum is not None and value < declared.minimum:
        return f"it must be at least {declared.minimum:g}"
    if declared.above is not None and value <= declared.above:
        return f"it must be more than {declared.above:g}"
    if declared.maximum is not None and value > declared.maximum:
        return f"it must be at most {declared.maximum:g}"
    return None


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _unwrap(hint: Any) -> tuple[type, bool, bool]:
    """Return (element type, is a list, may be None) of `int`, `int | None`, `list[str]` ..."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0]
    if typing.get_origin(hint) in (list, tuple):
        return typing.get_args(hint)[0], True, optional
    return (hint if hint is not Any else str), False, optional


def existing_path(value: Path, what: str) -> Path:
    """Return `value` made absolute, or raise OptionError if nothing is there."""
    path = value.expanduser()
    if not path.exists():
        raise OptionError(f"{path}: {what} not found. Check the path.")
    return path.resolve()
