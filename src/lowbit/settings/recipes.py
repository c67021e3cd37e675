"""`make_settings`: of flags, keyword arguments and a recipe, of which those of llm-compressor are translated first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowbit.errors import UsageError
from lowbit.files.regular import read_regular
from lowbit.foreign_recipes import find_equivalent, is_foreign, of_modifiers, translated
from lowbit.knobs import value_refused
from lowbit.settings.run_options import RunOptions
from lowbit.settings.table import Settings
from lowbit.spellings import meant_option


def make_settings(recipe: Any = None, **flags: Any) -> Settings:
    """Settings from a recipe, overridden by flags that are not None; UsageError for unknown or invalid ones.

    recipe  a YAML file, a mapping, or llm-compressor's: a file, YAML text, modifiers
    """
    values = {} if recipe is None else _read_recipe(recipe)
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        from_file = isinstance(recipe, str | Path) and where.split(".")[0] not in flags
        origin = f"{recipe}: " if from_file and "\n" not in str(recipe) else ""
        if first["type"] == "extra_forbidden":
            equivalent = find_equivalent(where, values.get(where))
            hint = f"{meant_option(where, Settings.model_fields)} ".lstrip()
            hint = hint if equivalent is None else f"here it is {equivalent}; "
            if where in RunOptions.model_fields:
                hint = f"give it as run=RunOptions({where}=…), or --{where.replace('_', '-')} on the command line; "
            raise UsageError(
                f"{origin}there is no setting {where}", f"{hint}known settings: {', '.join(Settings.model_fields)}"
            ) from error
        raise UsageError(f"{origin}{value_refused(error)}", "lowbit quantize --help lists the values") from error


def _read_recipe(recipe: Any) -> dict[str, Any]:
    where = str(recipe) if isinstance(recipe, str | Path) and "\n" not in str(recipe) else "the recipe"
    if isinstance(recipe, str | Path):
        values = _parsed_yaml(recipe, where)
    elif isinstance(recipe, Mapping):
        values = recipe
    else:
        values = of_modifiers(recipe if isinstance(recipe, list | tuple) else [recipe])
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: a recipe is a mapping of settings, found {type(values).__name__}")
    values = translated(values, where) if is_foreign(values) else values
    return {str(name): value for name, value in values.items()}


def _parsed_yaml(recipe: str | Path, where: str) -> Any:
    """Of a file, or of a text of several lines."""
    import yaml

    try:
        text = str(recipe) if "\n" in str(recipe) else read_regular(Path(recipe)).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read: {error}", "see docs/recipes.md for an example") from error
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML's constructors raise ValueError, IndexError, KeyError and more
        raise UsageError(f"{where}: cannot be read as YAML: {error}", "see docs/recipes.md for an example") from error
