"""`vlm presets`: list, show, diff, check, explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vlm.cli.completion import addresses, complete_key, complete_override, complete_preset, entry_name
from vlm.cli.output import echo_json, echo_result, log, table
from vlm.config.catalogue import BASES, list_presets
from vlm.config.errors import ExitCode, PresetError, RequestError
from vlm.config.files import keys_in
from vlm.config.load import resolve
from vlm.config.nearest import did_you_mean
from vlm.config.writing import digest, to_toml, toml_value

_directories = click.option(
    "--presets",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    is_eager=True,
    help="Directory of your own presets, looked up before those of vlm; may be repeated.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group()
def group() -> None:
    """List, show, compare, check and explain presets."""


@group.command("list")
@_directories
@click.option(
    "--command",
    "only",
    type=click.Choice(["pretrain", "finetune", "distill"]),
    help="Only those of a command.",
)
@click.option("--tag", help="Only those with a tag.")
@_json
def list_(presets: Sequence[Path], only: str | None, tag: str | None, as_json: bool) -> None:
    """List the presets: key, title, command."""
    entries = list_presets(presets)
    for entry in entries:
        if entry.problem:
            log(f"warning: {entry.problem}", fg="yellow")
    entries = [
        e for e in entries if (only in (None, e.command)) and (tag is None or tag in e.tags) and not e.problem
    ]
    if as_json:
        echo_json(
            [
                {"key": e.key, "title": e.title, "command": e.command, "tags": e.tags, "path": e.path}
                for e in entries
            ]
        )
    elif entries:
        echo_result(table([(e.key, e.command, e.title) for e in entries], ("KEY", "COMMAND", "TITLE")))
    else:
        known = sorted({name for entry in list_presets(presets) for name in entry.tags})
        log(f"no preset fits; there are the tags {', '.join(known)}" if tag else "no preset fits")


@group.command()
@click.argument("key", shell_complete=complete_preset)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_override)
@_directories
@click.option("--resolved", is_flag=True, help="Show what would run, each value with what set it.")
@_json
def show(key: str, overrides: Sequence[str], presets: Sequence[Path], resolved: bool, as_json: bool) -> None:
    """Show a preset as it is written or, with --resolved or KEY=VALUE, as it would run.

    KEY is a preset's key, a path that ends in .toml, or a run directory.
    """
    found = resolve(key, overrides, presets)
    if overrides:
        _check_overrides(key, overrides, presets)
    if as_json:
        origins = {path: str(origin) for path, origin in found.origins.items()}
        echo_json(
            {
                "key": key,
                "file": found.name,
                "files": [file.shown for file in found.files],
                "digest": digest(found.values),
                "values": found.values,
                "origins": {_address(path, found.values): origin for path, origin in origins.items() if path},
            }
        )
    elif resolved or overrides:
        echo_result(f"# {key}: resolved from {', '.join(file.label for file in found.files)}")
        echo_result(to_toml(found.values, found.origins).rstrip("\n"))
    else:
        echo_result(found.files[-1].text.rstrip("\n"))


def _check_overrides(key: str, overrides: Sequence[str], presets: Sequence[Path]) -> None:
    """Raises PresetError for what the command line sets and no preset may have. The schema is the trainer's, so this needs torch."""
    try:
        from vlm.training.preset import load_preset
    except ModuleNotFoundError:
        log("without torch the settings of the command line are not checked")
        return
    try:
        load_preset(key, overrides, presets)
    except PresetError as error:
        for problem in error.problems or (error,):
            if str(problem.where).startswith("command line"):
                raise PresetError(problem.message, where=problem.where, remedy=problem.remedy) from None


@group.command()
@click.argument("first", shell_complete=complete_preset)
@click.argument("second", shell_complete=complete_preset)
@_directories
@_json
def diff(first: str, second: str, presets: Sequence[Path], as_json: bool) -> None:
    """Show the settings in which two presets differ, and what set each.

    FIRST and SECOND are keys, paths that end in .toml, or run directories.
    """
    sides = [resolve(name, (), presets) for name in (first, second)]
    settings = [dict(addresses(side.values)) for side in sides]
    keys = [key for key in dict.fromkeys((*settings[0], *settings[1])) if _differ(settings, key)]
    if as_json:
        echo_json(
            [{"key": key, "first": settings[0].get(key), "second": settings[1].get(key)} for key in keys]
        )
        return
    for key in keys:
        echo_result(key)
        for mark, side, values in zip("-+", sides, settings):
            if key in values:
                sources = {_address(path, side.values): origin for path, origin in side.origins.items()}
                echo_result(f"  {mark} {_written(values[key])}  # from {sources.get(key, 'a default')}")
    log(f"{len(keys)} settings differ")


def _differ(settings: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(
        (key in values) != (key in settings[0]) or values.get(key) != settings[0].get(key)
        for values in settings
    )


@group.command()
@click.argument("keys", nargs=-1, metavar="[KEY|PATH]...", shell_complete=complete_preset)
@click.option("--all", "every", is_flag=True, help="Check every preset that comes with vlm.")
@_json
@click.pass_context
def check(ctx: click.Context, keys: Sequence[str], every: bool, as_json: bool) -> None:
    """Check presets against the schema; exit code 2 if any has a problem.

    KEY|PATH is a key, a path that ends in .toml, a run directory, or a directory of presets.
    """
    names = [name for key in keys for name in _expanded(key)]
    if every:
        names += [entry.key for entry in list_presets()]
    if not names:
        raise RequestError("nothing to check", remedy="name a preset or path, or give --all")
    from vlm.training.preset import load_preset

    results = []
    for name in names:
        try:
            load_preset(name)
            results.append({"key": name, "ok": True, "problems": []})
        except PresetError as error:
            results.append({"key": name, "ok": False, "problems": _problems(error)})
            if not as_json:
                log(f"error: {error}")
        else:
            if not as_json:
                echo_result(f"ok  {name}")
    failed = sum(not result["ok"] for result in results)
    if as_json:
        echo_json(results)
    else:
        log(f"{len(results)} checked, {failed} with problems")
    if failed:
        ctx.exit(int(ExitCode.WRONG_REQUEST))


def _expanded(key: str) -> list[str]:
    """A directory of presets as the paths in it, building blocks left out; anything else as it is."""
    folder = Path(key)
    if not folder.is_dir() or (folder / "preset.toml").is_file():
        return [key]
    found = [name for name in keys_in(folder) if name.split("/")[0] != BASES]
    if not found:
        raise RequestError("the directory holds no presets", where=key)
    return [str(folder / f"{name}.toml") for name in found]


def _problems(error: PresetError) -> list[dict[str, Any]]:
    problems = error.problems or (error,)
    return [{"where": p.where, "message": p.message, "remedy": p.remedy} for p in problems]


@group.command()
@click.argument("key", shell_complete=complete_preset)
@click.argument("name", required=False, metavar="[DOTTED.KEY]", shell_complete=complete_key)
@_directories
@_json
def explain(key: str, name: str | None, presets: Sequence[Path], as_json: bool) -> None:
    """Say what each key of a preset means: type, default, value and what set it.

    With DOTTED.KEY (train, train.steps, objectives.contrastive) only that key and those below it.
    """
    from vlm.training.preset import Preset

    explain_schema(key, name, presets, as_json, Preset)


def explain_schema(key: str, name: str | None, presets: Sequence[Path], as_json: bool, schema: Any) -> None:
    """What `explain` prints, for any schema."""
    from vlm.config.schema import document

    found = resolve(key, (), presets)
    docs = {_address(doc.path, found.values): doc for doc in document(schema, found.values)}
    chosen = {a: d for a, d in docs.items() if name is None or a == name or a.startswith(f"{name}.")}
    if not chosen and str(name).startswith("stages."):
        inside = ".".join(str(name).split(".")[2:]) or "train"
        raise RequestError(
            f"{name} is not explained by itself: a stage may set what the preset may", remedy=f"vlm presets explain {key} {inside}"
        )
    if not chosen:
        raise RequestError(f"{key} has no key {name!r}{did_you_mean(name, docs)}", remedy=f"vlm presets explain {key} shows all of them")
    rows = [_explained(address, doc, found) for address, doc in chosen.items()]
    if as_json:
        echo_json(rows)
        return
    for row in rows:
        echo_result(_lines(row))


def _explained(address: str, doc: Any, found: Any) -> dict[str, Any]:
    origin = found.tree.find(doc.path)
    return {
        "key": address,
        "type": doc.type,
        "required": doc.required,
        "default": doc.default,
        "description": doc.description,
        "set": doc.is_set,
        "value": doc.value if doc.is_set else doc.default,
        "from": str(origin.origin) if origin is not None and origin.origin is not None else None,
    }


def _lines(row: Mapping[str, Any]) -> str:
    simple = not isinstance(row["value"], dict) and not _has_tables(row["value"])
    head = f"{row['key']} = {_written(row['value'])}" if simple and row["value"] is not None else row["key"]
    source = f"from {row['from']}" if row["set"] else "required, not set" if row["required"] else "default"
    default = (
        f", default {_written(row['default'])}"
        if row["set"] and simple and row["default"] is not None
        else ""
    )
    text = f"{head}\n    {row['type']}{default}; {source}"
    return f"{text}\n    {row['description']}" if row["description"] else text


def _has_tables(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _written(value: Any) -> str:
    try:
        return toml_value(value)
    except TypeError:
        return str(value)


def _address(path: Sequence[str | int], values: Any) -> str:
    """A path as an override writes it: list entries by name."""
    parts = []
    for part in path:
        inside = values[part] if _holds(values, part) else None
        parts.append(entry_name(inside, part) if isinstance(part, int) else part)
        values = inside
    return ".".join(parts)


def _holds(values: Any, part: str | int) -> bool:
    if isinstance(values, Mapping):
        return part in values
    return isinstance(values, list) and isinstance(part, int) and part < len(values)
