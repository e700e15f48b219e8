"""`python -m vlm` is the `vlm` command."""

from vlm.cli.main import run

if __name__ == "__main__":
    run()
