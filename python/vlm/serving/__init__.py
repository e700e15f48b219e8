"""HTTP server over a bundle or a torch model: `create_app` and `serve`."""

from vlm.serving.app import create_app
from vlm.serving.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
