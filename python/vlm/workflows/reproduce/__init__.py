"""`vlm reproduce`: a preset's claim, measured against its baseline.

`statistics` decides, `claim` turns a preset into arms, `unit` trains and scores one arm with one seed, `store` keeps
what is finished, `measure` runs a whole claim, `rig` checks the method of measuring, `budget` chooses what to run
next, `page` writes docs/methods.md.
"""
