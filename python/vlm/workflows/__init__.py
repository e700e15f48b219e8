"""Workflows: what needs models and data together, above the trainer. One folder or file each."""
