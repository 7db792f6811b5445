"""The page on data tells the truth: its code runs as written."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_examples_of_the_data_page_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["state"]["position"] == 1
    assert set(names["batch"].ids) | set(next(names["again"]).ids) == {f"clip{n}" for n in range(4)}
    assert names["dialog_batch"].arrays.token_lengths.tolist() == [[25, 25, 25, 25, 25]]
    assert "rows2_" in capsys.readouterr().out
