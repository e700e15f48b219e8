"""`vlm completion SHELL`, and the completions that commands share: preset names and preset keys.

What is completed comes from the TOML files alone, so that a key press imports neither torch nor pydantic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")

_WHERE = {
    "bash": 'eval "$(vlm completion bash)"      in ~/.bashrc',
    "zsh": 'eval "$(vlm completion zsh)"       in ~/.zshrc',
    "fish": "vlm completion fish | source      in ~/.config/fish/config.fish",
}


@click.command(epilog="\b\nTo use it, write:\n" + "\n".join(f"  {line}" for line in _WHERE.values()))
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: commands, options, preset names and preset keys."""
    found = get_completion_class(shell)
    assert found is not None  # the three are click's own
    complete = found(ctx.find_root().command, {}, "vlm", "_VLM_COMPLETE")
    click.echo(complete.source_template % complete.source_vars())


def complete_preset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of presets; paths once the word looks like one."""
    from vlm.config.catalogue import list_presets

    if "/" in incomplete or incomplete.startswith("."):
        return [CompletionItem(incomplete, type="file")]
    search = tuple(Path(folder) for folder in ctx.params.get("presets") or ())
    return [
        CompletionItem(entry.key, help=entry.title or None)
        for entry in list_presets(search)
        if entry.key.startswith(incomplete)
    ]


def complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`key=` for every key that the preset named before sets; with `key=` typed, the value it has."""
    from vlm.config.errors import VlmError
    from vlm.config.load import resolve
    from vlm.config.writing import toml_value

    name = ctx.params.get("preset") or ctx.params.get("key")
    if not name:
        return []
    try:
        values = resolve(
            name, search=tuple(Path(folder) for folder in ctx.params.get("presets") or ())
        ).values
    except VlmError:
        return []
    items = []
    for key, value in addresses(values):
        written = toml_value(value)
        if f"{key}={written}".startswith(incomplete) and incomplete.startswith(f"{key}="):
            items.append(CompletionItem(f"{key}={written}"))
        elif f"{key}=".startswith(incomplete):
            items.append(CompletionItem(f"{key}=", help=f"now {written}"))
    return items


def complete_key(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Dotted keys, without a value."""
    items = complete_override(ctx, param, incomplete)
    return [CompletionItem(item.value.partition("=")[0], help=item.help) for item in items]


def addresses(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """(`train.steps`, value) of every value that is no table, as overrides address it: list entries by name or index."""
    found: list[tuple[str, Any]] = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                walk(item, f"{path}.{entry_name(item, index)}")
        else:
            found.append((path, value))

    walk(values, "")
    return found


def entry_name(entry: Any, index: int) -> str:
    """How an override calls a list entry."""
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else str(index)
