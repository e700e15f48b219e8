"""Data: sources, captions, packing, tokenizer, drawn scenes, the loader.

Entry points: `options.DataOptions` (the `[data]` table), `loader.build_loader`, `evaluation.iterate_once`,
`sources.open_source`, `tokenizer.Tokenizer`. Nothing is imported here: worker processes import only what
decoding needs, which does not include torch.
"""
