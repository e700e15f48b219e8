"""Entry point of the `vlm` command."""

import click


@click.group()
def run() -> None:
    """Pretrain, finetune, distill, evaluate, export and serve vision-language models."""
