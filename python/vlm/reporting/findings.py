"""The evaluation parts of a report: figures against chance, retrieval examples, confusions, surprise of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm.evaluation.result import flatten
from vlm.evaluation.table import PERCENT, bounds_of, share
from vlm.reporting.words import count, escape, label, number
from vlm.reporting.written import WRITING, cost_figures, written_figures

Stored = Mapping[str, Any]


def figures(results: Sequence[Stored]) -> str:
    """Each figure with its interval and chance level on a common scale; for models that write, their controls too."""
    return "".join(_article(result) for result in results)


def _article(result: Stored) -> str:
    if result["task"] in WRITING:
        return written_figures(result)
    return cost_figures(result) if result["task"] == "cost" else _figures(result)


def _figures(result: Stored) -> str:
    percent = result["task"] in PERCENT
    chance = dict(flatten(result.get("chance") or {}))
    bounds = bounds_of(result.get("intervals") or {})
    flat = [
        (path, value) for path, value in flatten(result["metrics"]) if percent or path.startswith("bits_per")
    ]
    most = max((max(v, bounds.get(p, (v, v))[1], chance.get(p, 0.0)) for p, v in flat), default=1.0)
    # Percent on a full scale unless everything is small: then the differences would not be seen.
    top = 100.0 if percent and most > 50 else most * 1.08 or 1.0
    rows, group = [], None
    for path, value in flat:
        head, _, name = path.rpartition("/")
        if head != group and head:
            queries = (result.get("details") or {}).get(head, {})
            said = (
                f" <small>{count(queries['queries'])} queries, {count(queries['candidates'])} candidates</small>"
                if queries
                else ""
            )
            rows.append(f'<h4 class="direction">{escape(label(head))}{said}</h4>')
        group = head
        rows.append(_row(label(name), value, bounds.get(path), chance.get(path), top, percent))
    data = result.get("data") or {}
    unit = "percent" if percent else "lower is better"
    about = f"{count(result.get('samples'))} samples of <code>{escape(str(data.get('uri', 'memory')))}</code>, {unit}"
    details = result.get("details") or {}
    clusters = details.get("clusters") or (details.get("image_to_text") or {}).get("clusters")
    if clusters and clusters != result.get("samples"):
        about += f", intervals over {count(clusters)} concepts"
    title = str(result.get("name") or result["task"])
    kind = "" if title == result["task"] else f" <small>{escape(result['task'])}</small>"
    return f'<article class="result"><h3>{escape(title)}{kind}</h3><p class="about">{about}</p>{"".join(rows)}</article>'


def _row(
    name: str,
    value: float,
    bounds: tuple[float, float] | None,
    chance: float | None,
    top: float,
    percent: bool,
) -> str:
    def at(x: float) -> str:
        return f"{100 * min(max(x / top, 0), 1):.2f}%"

    say = share if percent else number
    track = ""
    said = f"{name}: {say(value)}"
    if bounds is not None:
        low, high = bounds
        track += f'<i class="interval" style="left:{at(low)};width:{100 * min(max((high - low) / top, 0), 1):.2f}%"></i>'
        said += f", 95% interval {say(low)} to {say(high)}"
    if chance is not None:
        track += f'<i class="chance" style="left:{at(chance)}"></i>'
        said += f", chance {say(chance)}"
    track += f'<i class="value" style="left:{at(value)}"></i>'
    extra = ""
    if bounds is not None:
        extra = f"<small>{say(bounds[0])} – {say(bounds[1])}</small>"
    if chance is not None:
        times = f" · {value / chance:.3g}×" if percent and chance > 0 and value / chance >= 1.5 else ""
        extra += f"<small>chance {say(chance)}{times}</small>"
    return (
        f'<div class="figure"><span class="name">{escape(name)}</span>'
        f'<span class="track" role="img" aria-label="{escape(said)}">{track}</span>'
        f'<span class="numbers"><b>{say(value)}</b>{extra}</span></div>'
    )


def _picture(uri: Any, text: str) -> str:
    if isinstance(uri, str) and uri.startswith("data:image/"):
        return f'<img src="{escape(uri)}" alt="{escape(text)}" loading="lazy">'
    return '<span class="nopicture">not stored</span>'


def _place(rank: int) -> str:
    if rank == 1:
        return '<span class="mark good">found first</span>'
    if 0 < rank <= 10:
        return f'<span class="mark near">place {rank}</span>'
    return (
        f'<span class="mark miss">place {rank:,}</span>'
        if rank
        else '<span class="mark miss">none of the classes</span>'
    )


def gallery(result: Stored, direction: str) -> str:
    """Examples of one direction, in the order of their random draw. '' when there are none."""
    chosen = [e for e in result.get("examples") or () if e.get("direction") == direction]
    draw = _texts_to_pictures if direction == "text_to_image" else _pictures_to_texts
    return "".join(draw(example) for example in chosen)


def _texts_to_pictures(example: Stored) -> str:
    cells = []
    for place, hit in enumerate(example["found"], start=1):
        right = bool(hit.get("right"))
        said = f"place {place}, {'right' if right else 'wrong'}"
        tick = '<span class="tickmark" aria-hidden="true">✓</span>' if right else ""
        cells.append(
            f'<li class="{"right" if right else "wrong"}" title="{escape(str(hit.get("key", "")))}">'
            f'{_picture(hit.get("picture"), said)}{tick}</li>'
        )
    return (
        f'<article class="example"><header><q>{escape(str(example["query"]))}</q>{_place(int(example["rank"]))}</header>'
        f'<ol class="strip">{"".join(cells)}</ol></article>'
    )


def _pictures_to_texts(example: Stored) -> str:
    rows = []
    scores = [float(hit["score"]) for hit in example["found"]]
    high = max([*scores, 1e-9])
    for hit, score in zip(example["found"], scores):
        right = bool(hit.get("right"))
        width = 100 * min(max(score / high, 0.0), 1.0)
        tick = (
            '<span class="tickmark" aria-hidden="true">✓</span><span class="hidden">right: </span>'
            if right
            else ""
        )
        rows.append(
            f'<li class="{"right" if right else "wrong"}"><span class="bar" style="width:{width:.0f}%"></span>'
            f"<span class=words>{tick}{escape(str(hit['text']))}</span><small>{score:.2f}</small></li>"
        )
    truth = " / ".join(str(t) for t in example.get("truth") or ()) or "none of the classes"
    why = "".join(f"<li>{escape(str(one['text']))} <small>{float(one['score']):.2f}</small></li>" for one in example.get("why") or ())
    return (
        f'<article class="example sideways">{_picture(example.get("picture"), truth)}<div>'
        f"<header><span>{escape(truth)}</span>{_place(int(example['rank']))}</header>"
        f'<ol class="answers">{"".join(rows)}</ol>{f"<p>what speaks for it</p><ul>{why}</ul>" if why else ""}</div></article>'
    )


def confusion(result: Stored) -> str:
    """The heat map of a zero-shot result, with its most frequent confusions in words. '' when it has none."""
    details = result.get("details") or {}
    matrix = details.get("confusion") or {}
    counts = matrix.get("counts") or []
    if len(counts) < 2:
        return ""
    names = [str(name) for name in matrix.get("names") or matrix["classes"]]
    columns = [*names, "others"] if matrix.get("other") else names
    head = "".join(f"<th scope=col><span>{escape(name)}</span></th>" for name in columns)
    body = []
    for i, (name, row) in enumerate(zip(names, counts)):
        total = sum(row) or 1
        cells = []
        for j, times in enumerate(row):
            kind = "right" if i == j else "wrong"
            said = f"{name}, answered {columns[j]}: {times} of {total}"
            shown = times if times else ""
            strong = " strong" if times / total > 0.55 else ""
            cells.append(
                f'<td class="{kind}{strong}" style="--v:{times / total:.3f}" title="{escape(said)}">{shown}</td>'
            )
        body.append(f"<tr><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>")
    shown = (
        f"The {len(names)} most frequent of {details.get('classes')} classes"
        if matrix.get("other")
        else "All classes"
    )
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="confusion table"><table class="heat">'
        f"<caption>{shown}. Rows are true, columns answered; the diagonal is right.</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
    pairs = "".join(
        f"<li><b>{escape(str(p['true']))}</b> taken for <b>{escape(str(p['answered']))}</b> "
        f"<small>{p['count']} times, {100 * p['share']:.0f}% of them</small></li>"
        for p in (details.get("confused") or ())[:8]
    )
    listed = f'<div><h4>Most often confused</h4><ul class="pairs">{pairs}</ul></div>' if pairs else ""
    return f"{table}{listed}"


def surprise(result: Stored) -> str:
    """Documents of a language model, each token shaded by the bits it took. '' when there are none."""
    out = []
    for example in result.get("examples") or ():
        tokens, bits = example.get("tokens") or [], example.get("bits") or []
        if not tokens:
            continue
        words = "".join(
            f'<span style="--v:{min(b / 12, 1):.2f}" title="{b:.1f} bits">{escape(str(t))}</span>'
            for t, b in zip(tokens, bits)
        )
        more = " …" if example.get("cut") else ""
        out.append(
            f'<article class="example"><header><span>{escape(str(example["key"]))}</span>'
            f'<span class="mark">{number(float(example["bits_per_character"]))} bits a character</span></header>'
            f'<p class="tokens">{words}{more}</p></article>'
        )
    return "".join(out)
