"""Files and folders: what is there is kept, and what cannot be read is named."""

from pathlib import Path

import pytest

from bertling.files import BertlingError, atomic_folder, read_json


def test_a_folder_that_is_there_is_kept_without_force(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(BertlingError, match="data: exists already; give --force to replace it"), atomic_folder(target):
        pytest.fail("worked before it refused")
    with atomic_folder(target, force=True) as folder:
        (folder / "new").touch()
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", r"a\.json: this manifest must hold a JSON object, not list$"),
        ('{"rows": ', r"a\.json: this manifest is not valid JSON \(.*\); restore or remake it$"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BertlingError, match=message):
        read_json(tmp_path / "a.json", "manifest")
