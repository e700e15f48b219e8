"""Questions shared by several test files say what differs, as the tests themselves do."""

import pytest

pytest.register_assert_rewrite("tests.models.decoder_questions")
