"""What an error says: no credentials of a URL, wherever it comes from."""

from __future__ import annotations

import pytest

from bd3_scale.errors import DataError, without_credentials


@pytest.mark.parametrize(
    "url", ["https://user:pass@host/x", "s3://KEY:se/cr?et+@bucket/run", "https://host/x?signature=secret", "gs://token@bucket/run"]
)
def test_no_text_shows_credentials(url: str) -> None:
    shown = str(DataError(f"cannot read {url}; set data.remote='{url}'"))
    assert not any(secret in shown for secret in ("pass", "cr?et", "signature", "token")) and "set data.remote=" in shown
    assert without_credentials({"a": [(url,)]}) == {"a": [(without_credentials(url),)]}


@pytest.mark.parametrize("url", ["s3://bucket/run@v2", "https://host:8080/run", "a ratio of 1:2@3"])
def test_other_texts_stay(url: str) -> None:
    assert without_credentials(url) == url
