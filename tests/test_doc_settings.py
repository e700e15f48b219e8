"""Every piece of TOML in the pages of docs/ is laid over a preset and read as the trainer reads it."""

import re
from pathlib import Path

import pytest

from vlm.training.preset import load_preset

DOCS = Path(__file__).parents[1] / "docs"
OVER = {
    "vision-language": "pyramiddrop",
    "token-reduction": "vlm-tiny",
    "long-context": "hip",
    "swin": "swin-v2",
    "video": "xclip",
    "data": "clip-tiny",
    "reproduce": "siglip-tiny",
    "weights": "clip-tiny",
    "classes": "coop",
    "compositional": "clip-tiny",
}
"""Page -> the preset that its pieces are laid over."""
OTHERWISE = {("token-reduction", "[model.vision"): "clip-tiny", ("weights", '"token-weights"'): "pyramiddrop"}
"""(page, words of a piece) -> the preset for such a piece: tables of dual encoders, streams of conversations."""
BLOCKS = [
    (page, number, block)
    for page in OVER
    for number, block in enumerate(re.findall(r"^```toml\n(.*?)\n```$", (DOCS / f"{page}.md").read_text("utf-8"), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_a_piece_of_toml_on_a_page_is_what_a_preset_may_say(tmp_path, page, number, block):
    base = next((base for (where, words), base in OTHERWISE.items() if where == page and words in block), OVER[page])
    (tmp_path / "piece.toml").write_text(f'schema = 1\nextends = "{base}"\n{block}\n', encoding="utf-8")
    load_preset(str(tmp_path / "piece.toml"))


def test_no_page_with_toml_is_forgotten():
    pages = {path.stem for path in DOCS.glob("*.md") if "```toml" in path.read_text("utf-8")}
    assert pages == set(OVER)
