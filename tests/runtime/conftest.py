import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bundle_fixtures import clip_bundle, clip_model, language_bundle, siglip_bundle  # noqa: E402, F401
