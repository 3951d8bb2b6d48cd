"""Files that somebody else may have put there: how much of them is read, and who may read what we make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedfuse.config.files import opened, read
from fedfuse.errors import UserError


def test_a_file_has_as_many_bytes_as_are_allowed_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcd")
    assert read(path, 4) == b"abcd"
    assert read(path, 5) == b"abcd"
    with pytest.raises(UserError, match=r"a\.txt: more than 3 bytes"):
        read(path, 3)


def test_what_is_made_others_may_read_and_not_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        os.close(opened(tmp_path / "made", os.O_WRONLY | os.O_CREAT))
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o644
