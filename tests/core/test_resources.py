"""The environment that the suite reads."""

import pytest

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import source_date


@pytest.mark.parametrize("epoch", ["yesterday", "1.5", "99999999999999999999"])
def test_a_date_that_is_none_is_refused(monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(
        GlmlabError, match=f"SOURCE_DATE_EPOCH is '{epoch}', not a number of seconds since 1970. Set it"
    ):
        source_date()


def test_no_date_is_none(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert source_date() is None
