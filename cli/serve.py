"""`vlm serve`: a model behind an HTTP interface."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path

import click
from click.core import ParameterSource


@click.command(name="serve")
@click.argument("model", metavar="MODEL")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="port to listen on; 0 takes a free one")
@click.option("--name", help="model name in requests and answers [default: the model's]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="file with an API key a line; guards every route but /health")
@click.option(
    "--allow-host", multiple=True, metavar="NAME",
    help="a name in the URLs of requests, beside localhost and addresses; * for any [default: any where an API key guards]",
)
@click.option("--threads", type=click.IntRange(min=1), help="threads of one operator [default: the framework's choice]")
@click.option("--max-batch", type=click.IntRange(min=1), default=32, show_default=True, help="items of one model call")
@click.option("--max-body-mb", type=click.FloatRange(min=0, min_open=True), default=32, show_default=True, help="size of one request body")
@click.option("--max-megapixels", type=click.FloatRange(min=0, min_open=True), default=40, show_default=True, help="size of one picture")
@click.option("--max-requests", type=click.IntRange(min=1), default=64, show_default=True, help="requests at a time; more get 429")
@click.option("--deadline", type=click.FloatRange(min=0, min_open=True), default=60, show_default=True, help="seconds a request may take")
def command(
    model: str, host: str, port: int, name: str | None, api_key_file: Path | None, allow_host: tuple[str, ...],
    threads: int | None, max_batch: int,
    max_body_mb: float, max_megapixels: float, max_requests: int, deadline: float,
) -> None:  # fmt: skip
    """Serve MODEL: a bundle (without torch), a run or a Hugging Face directory.

    Of a dual encoder POST /v1/embeddings and /v1/classify, of a model that writes POST /v1/chat/completions, in OpenAI's
    form, pictures as data URIs; GET /v1/models, /health/live, /health/ready, /metrics. Nothing is fetched from anywhere.
    SIGTERM finishes running requests first.
    """
    from vlm.cli.generators import open_served
    from vlm.serving import ServerSettings, create_app
    from vlm.serving.auth import read_keys
    from vlm.serving.server import bind, serve

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    keys = read_keys(api_key_file) if api_key_file is not None else ()
    chosen = click.get_current_context().get_parameter_source("max_batch") is not ParameterSource.DEFAULT
    settings = ServerSettings(
        max_body_bytes=round(max_body_mb * 2**20),
        max_pixels=round(max_megapixels * 1e6),
        max_batch=max_batch,
        **({"max_answers": max_batch} if chosen else {}),  # an answer holds far more memory than a vector
        max_requests=max_requests,
        deadline_seconds=deadline,
    )
    with bind(host, port) as listener:  # a taken port is said before the model is loaded
        served_model = open_served(model, threads=threads, batch_size=max_batch)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        if not keys and not _loopback(host):
            said = f"warning: {host} is not a loopback address and there is no --api-key-file: anyone who reaches it may use it"
            click.echo(said, err=True)
        served = name or _name(model, served_model.name)
        # A page of another name cannot know a key; without one, the name is what keeps it out.
        hosts = None if "*" in allow_host or (keys and not allow_host) else (*allow_host, host)
        app = create_app(served_model, settings.model_copy(update={"name": served}), api_keys=keys, hosts=hosts)
        serve(app, listener, settings, started=lambda: click.echo(f"serving {served} on {address}", err=True))


def _name(model: str, given: str) -> str:
    """A bundle has a name; a directory is called by its own, never by a path of this machine."""
    if given != model:
        return given
    path = Path(model).resolve()
    return path.parent.name if path.name == "model" else path.name


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
