"""Files that are whole at every moment, and what is done about those that are not."""

from __future__ import annotations

import errno
import json
import warnings

import pytest

from pyfused import files
from pyfused.choice import measured

ROW = {
    "gpu": "G", "capability": [9, 0], "subject": "lora_linear", "dtype": "bfloat16", "rows": 64,
    "sizes": {"N": 768, "K": 768, "R": 16, "dropout_p": 0.0}, "found": {"triton": 1.0, "cuda": 2.0}, "source": {},
}  # fmt: skip


class TestReplacing:
    def test_what_was_written_takes_the_place(self, tmp_path):
        path, before = tmp_path / "a.json", tmp_path / "b.json"
        path.write_text("old")
        before.hardlink_to(path)
        with files.replacing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert before.read_text() == "old", "not written over, but replaced"
        assert set(tmp_path.iterdir()) == {path, before}

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), OSError(errno.ENOSPC, "full")])
    def test_where_it_fails_nothing_has_happened(self, error, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("old")

        def fail():
            with files.replacing(path) as partial:
                partial.write_text("ne")
                raise error

        with pytest.raises(type(error)) as raised:
            fail()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
        if isinstance(error, OSError):
            assert (raised.value.filename, raised.value.strerror) == (str(path), "full")

    def test_a_folder_that_is_not_there(self, tmp_path):
        path = tmp_path / "no" / "a.json"
        with pytest.raises(FileNotFoundError) as raised, files.replacing(path) as partial:
            partial.write_text("new")
        assert raised.value.filename == str(path)

    def test_a_link_leads_to_what_is_replaced(self, tmp_path):
        target, link = tmp_path / "a.json", tmp_path / "link.json"
        target.write_text("old")
        link.symlink_to(target)
        with files.replacing(link) as partial:
            partial.write_text("new")
        assert link.is_symlink()
        assert target.read_text() == "new"

    def test_another_files_error_keeps_its_name(self, tmp_path):
        with pytest.raises(FileNotFoundError) as raised, files.replacing(tmp_path / "a.json"):
            (tmp_path / "input.txt").read_text()
        assert raised.value.filename == str(tmp_path / "input.txt")


class TestMeasured:
    @pytest.mark.parametrize(
        "text",
        [
            "", "[", "{}", "[1]", "3", "null", "[" * 100_000, json.dumps([ROW | {"found": {}}]),
            json.dumps([ROW | {"capability": 3}]), json.dumps([ROW | {"found": {"triton": 0.0, "cuda": 1.0}}]),
            json.dumps([ROW | {"found": {"triton": "fast", "cuda": 1.0}}]), json.dumps([ROW | {"speed": 1}]),
            json.dumps([ROW | {"rows": "5"}]),
            json.dumps([{key: value for key, value in ROW.items() if key != "rows"}]),
        ],
    )  # fmt: skip
    def test_a_damaged_file_costs_a_warning(self, text, tmp_path):
        path = tmp_path / "measured.json"
        path.write_text(text)
        if text == "{}":
            # No row is no damage.
            assert measured.load(path).rows == []
            return
        with pytest.warns(UserWarning, match=r"what `pyfused tune` measured is left out: .*measured\.json must hold"):
            table = measured.load(path)
        assert table.rows == []
        with pytest.raises(ValueError, match="must hold a list of rows"):
            measured.read(path)

    def test_a_whole_file_warns_of_nothing(self, tmp_path):
        path = tmp_path / "measured.json"
        measured.write([measured.Row(**ROW | {"capability": (9, 0)})], path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(measured.load(path).rows) == 1
            assert measured.load(tmp_path / "none.json").rows == []
