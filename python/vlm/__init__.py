"""vlm: pretrain, finetune, distill, evaluate, export and serve vision-language models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vlm-forge")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0.0.0"
