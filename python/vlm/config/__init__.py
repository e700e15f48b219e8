"""Preset machinery: loading, inheritance, overrides, positions of errors. Imports no torch."""
