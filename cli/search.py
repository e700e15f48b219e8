"""`vlm search`: pictures by text, over the vectors that `vlm embed` wrote."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator

import click

from vlm.config.errors import DataError

_ROWS = 4096


@click.command(name="search")
@click.argument("model", metavar="MODEL")
@click.argument("query", metavar="QUERY")
@click.option("--index", required=True, metavar="FILE|-", help="JSON lines from vlm embed MODEL --images ...")
@click.option("-k", "--top", type=click.IntRange(min=1), default=10, show_default=True, help="results to show")
@click.option("--threads", type=click.IntRange(min=1), help="threads of one operator")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a result")
def command(model: str, query: str, index: str, top: int, threads: int | None, as_json: bool) -> None:
    """Find the indexed pictures that fit QUERY best.

    MODEL must be the one that made the index: a run, a Hugging Face directory or a bundle. The index is read as a
    stream, so it may be larger than memory. Its {"error"} lines are passed over.
    """
    import numpy as np

    from vlm.cli.encoders import open_embedder

    vector = open_embedder(model, threads=threads).encode_text([query])[0]
    best: list[tuple[float, int, str]] = []
    for first, names, rows in _blocks(index, len(vector)):
        cosines = np.asarray(rows, np.float32) @ vector
        # The row number breaks ties in favour of the earlier line.
        best = heapq.nlargest(top, [*best, *((float(c), -(first + i), n) for i, (c, n) in enumerate(zip(cosines, names)))])
    if not best:
        raise DataError("the index holds no vectors", where=index, remedy="make it with vlm embed MODEL --images ... > index.jsonl")
    for rank, (cosine, _, name) in enumerate(best, 1):
        if as_json:
            print(json.dumps({"rank": rank, "input": name, "cosine": round(cosine, 6)}), flush=True)
        else:
            print(f"{cosine:.4f}  {name}", flush=True)


def _blocks(index: str, width: int) -> Iterator[tuple[int, list[str], list[list[float]]]]:
    """(number of the first row, inputs, vectors) of up to _ROWS lines. Raises DataError naming file and line."""
    from vlm.cli.streams import read_lines

    names: list[str] = []
    rows: list[list[float]] = []
    first = 0
    for number, line in enumerate(read_lines(index), 1):
        if not line.strip():
            continue
        entry = _entry(line, f"{index}:{number}", width)
        if entry is None:
            continue
        names.append(entry[0])
        rows.append(entry[1])
        if len(rows) == _ROWS:
            yield first, names, rows
            first, names, rows = first + len(rows), [], []
    if rows:
        yield first, names, rows


def _entry(line: bytes, where: str, width: int) -> tuple[str, list[float]] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where, remedy="expected lines from vlm embed") from None
    if isinstance(entry, dict) and "error" in entry:
        return None
    vector = entry.get("embedding") if isinstance(entry, dict) else None
    if not isinstance(vector, list) or "input" not in entry or not all(isinstance(x, int | float) for x in vector):
        raise DataError('expected {"input", "embedding": [numbers]}', where=where, remedy="make the index with vlm embed")
    if not math.isfinite(sum(vector)):
        raise DataError("a vector with a number that is not finite", where=where, remedy="make the index again: its model is unusable")
    if len(vector) != width:
        raise DataError(
            f"a vector of {len(vector)} numbers, this model gives {width}", where=where, remedy="make the index again with this model"
        )
    return str(entry["input"]), vector
