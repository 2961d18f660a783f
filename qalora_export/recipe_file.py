"""A recipe's file: TOML → settings and back. Every wrong key of it is named at once, with what was probably meant."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qalora_export.errors import InputError, UnsafeInputError, did_you_mean
from qalora_export.recipe import HUB_ID, Recipe
from qalora_export.safety.confined import Confined, FailedError, OutOfBoundsError
from qalora_export.safety.paths import StrPath, local_path
from qalora_export.safety.regular import regular_file

MAX_RECIPE_BYTES = 2**20
SettingsT = TypeVar("SettingsT", bound=BaseModel)
# Settings that are paths, by their table; relative ones are relative to the recipe's own folder.
PATH_KEYS = {
    "": ("model", "out"),
    "quantize": ("calibration",),
    "train": ("data", "validation"),
    "evaluate": ("data",),
    "compare": ("text",),
    "verify": ("prompts",),
}


def load_recipe(path: StrPath, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a TOML recipe; `overrides` maps dotted keys ("train.rank") to values and beats the file.

    Relative paths in the recipe are relative to the recipe's own folder. Raises InputError with "did you mean",
    UnsafeInputError for a file that is no recipe by its size or takes too long to parse.
    """
    path = local_path(path)
    raw = _parsed(regular_file(path, "recipe"))
    _resolve_paths(raw, path.parent)
    for dotted, value in (overrides or {}).items():
        *tables, leaf = dotted.split(".")
        target = raw
        for table in tables:
            target = target.setdefault(table, {}) if isinstance(target, dict) else target
        if not isinstance(target, dict):
            raise InputError("a setting lies below a value that is not a table", where=dotted, fix="check the key")
        target[leaf] = value
    return validated(Recipe, raw, where=path)


def _parsed(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Parsed in a confined process: a key of many dots takes memory by their square."""
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UnsafeInputError(f"the recipe is larger than {MAX_RECIPE_BYTES:,} bytes", where=path)
    try:
        raw: dict[str, Any] = Confined(_tables)(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError("the recipe is not valid TOML", where=path, why=str(error)) from error
    except FailedError as error:
        raise InputError("the recipe is not valid TOML", where=path, why=str(error)) from error
    except OutOfBoundsError as error:
        raise UnsafeInputError("the recipe cannot be parsed", where=path, why=str(error)) from error
    return raw


def _tables(text: str) -> Any:
    # TOML's dates become strings, which no setting takes.
    return json.loads(json.dumps(tomllib.loads(text), default=str))


def validated(model: type[SettingsT], raw: dict[str, Any], *, where: object) -> SettingsT:
    """Validate a table of settings; one InputError naming every offending key."""
    try:
        # JSON mode: lists become tuples, numbers stay strict.
        return model.model_validate_json(json.dumps(raw, default=str))
    except RecursionError as error:
        raise InputError("settings nest too deeply", where=where) from error
    except ValidationError as error:
        problems = [_explain(model, item) for item in error.errors()]
        raise InputError("settings are not valid", where=where, why="; ".join(problems)) from error


def dump_toml(settings: BaseModel) -> str:
    """The resolved settings as TOML that load_recipe reads back to the same object (unset values left out)."""
    lines: list[str] = []
    _dump_table(settings.model_dump(mode="json", exclude_none=True), "", lines)
    return "\n".join(lines).strip() + "\n"


def _dump_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    nested = {
        k: v for k, v in table.items() if isinstance(v, dict) or (v and isinstance(v, list) and isinstance(v[0], dict))
    }
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in nested]
    for key, value in nested.items():
        for item in value if isinstance(value, list) else [value]:
            header = f"[[{prefix}{key}]]" if isinstance(value, list) else f"[{prefix}{key}]"
            lines += ["", header]
            _dump_table(item, f"{prefix}{key}.", lines)


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    for table, keys in PATH_KEYS.items():
        target = raw.get(table, {}) if table else raw
        for key in keys:
            if isinstance(target, dict) and isinstance(target.get(key), str):
                path = folder / local_path(target[key])
                if key != "model" or path.exists() or not HUB_ID.fullmatch(target[key]):
                    target[key] = str(path)


def _explain(model: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] != "extra_forbidden":
        return f"{dotted}: {item['msg'].removeprefix('Value error, ')}"
    return f"unknown key {dotted!r}, {did_you_mean(location[-1], _keys_at(model, location[:-1]))}"


def _keys_at(model: type[BaseModel], location: Iterable[str]) -> list[str]:
    """Field names of the settings class that sits at a location inside `model`."""
    for part in location:
        if part in model.model_fields:
            model = _settings_class(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _settings_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _settings_class(argument):
            return found
    return None
