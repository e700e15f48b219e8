from tests.bundle_fixtures import clip_bundle, clip_model, language_bundle, siglip_bundle  # noqa: F401
