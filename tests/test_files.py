"""Files that are there in whole or not at all."""

from __future__ import annotations

import os

import pytest

from nnssl_stc3d.files import written_whole


@pytest.mark.parametrize("shared", [False, True])
def test_the_file_takes_its_name_when_the_block_ends(tmp_path, shared):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with written_whole(path, shared=shared) as beside:
        beside.write_text("after")
        assert path.read_text() == "before" and beside.parent == tmp_path
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["table.csv"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(error), written_whole(path) as beside:
        beside.write_text("ha")
        raise error
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["table.csv"]


def test_nothing_written_is_nothing_done(tmp_path):
    with written_whole(tmp_path / "table.csv"):
        pass
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_is_not_taken(tmp_path):
    file = tmp_path / "file"
    file.write_text("good")
    (tmp_path / "file.tmp").write_text("ha")
    with written_whole(file):
        pass
    assert file.read_text() == "good" and list(tmp_path.iterdir()) == [file]


def test_several_processes_write_to_files_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    with written_whole(path, shared=True) as ours:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with written_whole(path, shared=True) as theirs:
            ours.write_text("ours")
            theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours" and os.listdir(tmp_path) == ["table.csv"]
