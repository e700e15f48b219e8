"""Hypothesis strategies for TOML values and tables, shared by the tests of `vlm.config`."""

import datetime

from hypothesis import strategies as st

keys = st.one_of(
    st.text("abcxyz_-019", min_size=1, max_size=6),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    text,
    st.dates(min_value=datetime.date(1000, 1, 1)),
    st.times(),
    st.datetimes(min_value=datetime.datetime(1000, 1, 1)),
)

values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=12,
)

tables = st.dictionaries(keys, values, max_size=4)
