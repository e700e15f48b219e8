from tests.answering_fixtures import prefix_bundle, prefix_model  # noqa: F401
from tests.bundle_fixtures import clip_bundle, clip_model, language_bundle, siglip_bundle  # noqa: F401
