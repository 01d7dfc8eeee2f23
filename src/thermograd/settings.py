"""Sections of configuration files: read, checked key by key, explained in one paragraph, written."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError

__all__ = ["Root", "Section", "explain", "flat", "read_toml", "to_toml"]


class Section(BaseModel):
    """A table of a configuration: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Root(Section):
    """A whole configuration."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> Self:
        """Check a nested dictionary.

        Raises:
            ConfigError: a key is unknown or absent, or a value is not what is expected.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise explain(error, values, source, cls) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        ConfigError: the file is absent or not TOML (with line and column).
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {path.absolute()}",
            expected="a configuration in TOML",
            remedy="check the path, or start from one of the examples",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", expected="a text file in TOML") from None
    except tomllib.TOMLDecodeError as error:
        lines = text.splitlines() or [""]
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the file"
        raise ConfigError(
            f"{path} is not valid TOML: {str(error).replace('at end of document', end)}",
            expected='lines such as [section] and key = value, with text in "quotes"',
        ) from None
    return values


# ---------------------------------------------------------------------- from pydantic's errors to one paragraph


def explain(error: ValidationError, values: Mapping[str, Any], source: str, root: type[BaseModel]) -> ConfigError:
    """One paragraph about the first fault; the other faulty keys are named."""
    # unknown keys first: a misspelt key is the usual reason why another one is absent
    faults = sorted(error.errors(include_url=False), key=lambda f: f["type"] != "extra_forbidden")
    fault = faults[0]
    location = _location(fault["loc"], values)
    if not location:  # what several keys say together
        return ConfigError(f"{source} is wrong: {fault['msg'].removeprefix('Value error, ')}")
    key = ".".join(location)
    others = sorted({".".join(_location(f["loc"], values)) for f in faults[1:]} - {key})
    more = f"; also wrong: {', '.join(others)}" if others else ""
    section = _section_of(location, root)
    if fault["type"] == "extra_forbidden":
        known = list(section.model_fields) if section else list(root.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        value = "" if isinstance(fault["input"], dict) else f" = {_short(fault['input'])}"
        return ConfigError(f"unknown key {key}{value}{guess} in {source}{more}", expected=f"one of {', '.join(known)}")
    meaning = _describe(section, location[-1])
    if fault["type"] == "missing":
        return ConfigError(f"the key {key} is absent from {source}{more}", expected=meaning or f"a section [{key}]")
    if fault["type"] == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        return ConfigError(f"{key} is wrong in {source}{more}: {message}")
    same = [f["msg"] for f in faults if _location(f["loc"], values) == location]  # one for each member of a union
    message = " or ".join(dict.fromkeys(m.removeprefix("Input should be ") for m in same))
    message = re.sub(r" or instance of \w+", "", message.replace("valid dictionary", "table"))
    guess = _near_miss(fault)
    where = f" ({meaning})" if meaning else ""
    return ConfigError(
        f"{key} is {_short(fault['input'])} in {source}{more}",
        expected=f"{message.replace('a valid integer', 'an integer').replace('a valid ', 'a ')}{where}{guess}",
    )


def _location(parts: tuple[int | str, ...], values: Any) -> list[str]:
    """The key's place, without the names that pydantic adds for the members of a union."""
    place: list[str] = []
    for part in parts:
        inside = isinstance(values, Mapping) and (part in values or not place or part == parts[-1])
        if not (inside or (isinstance(values, list) and isinstance(part, int))):
            break
        place.append(str(part))
        values = values.get(part) if isinstance(values, Mapping) else values[part]  # type: ignore[index]
    return place


def _section_of(location: list[str], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section that a key belongs to; a table of sections is passed through by its own keys."""
    section: Any = root
    inside_table = False
    for part in location[:-1]:
        if inside_table:
            inside_table = False
            continue
        field = section.model_fields.get(part) if section is not None else None
        kind = field.annotation if field else None
        inside_table = typing.get_origin(kind) is dict
        section = next((k for k in (kind, *typing.get_args(kind)) if _is_section(k)), None)
    return section


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _describe(section: type[BaseModel] | None, key: str) -> str:
    field = section.model_fields.get(key) if section else None
    return (field.description or "") if field else ""


def _near_miss(fault: Any) -> str:
    if fault["type"] != "literal_error" or not isinstance(fault["input"], str):
        return ""
    choices = [c.strip(" '") for c in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]
    close = difflib.get_close_matches(fault["input"], choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------- TOML


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def to_toml(values: Mapping[str, Any]) -> str:
    """A nested table as TOML."""
    return "\n".join(_toml_table(values, ())).strip() + "\n"


def _toml_table(values: Mapping[str, Any], place: tuple[str, ...]) -> list[str]:
    lines = [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in values.items() if not isinstance(v, Mapping)]
    if place and (lines or not values):
        lines.insert(0, f"\n[{'.'.join(map(_toml_key, place))}]")
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _toml_table(value, (*place, key))
    return lines


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    return value.isoformat() if hasattr(value, "isoformat") else repr(value)
