"""The script of docs/api.md is run, and type-checked as by a user who installed the wheel."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Trained

PAGE = ROOT / "docs" / "api.md"


def blocks() -> list[str]:
    """The page's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_blocks_of_the_page_run(
    data: Path, baseline: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the shards and the run of these tests instead of the quickstart's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart-data").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart-data" / "shards").symlink_to(data / "shards")
    run = tmp_path / "runs" / "quickstart"
    shutil.copytree(baseline.run.path, run)
    there: dict[str, Any] = {}
    for block in blocks():
        exec(compile(block, PAGE, "exec"), there)
    recipe, opened = there["recipe"], there["data"]
    size = recipe.batch.global_batch_size
    assert there["numbers"].tolist() == opened.order(recipe.seed).take(10 * size, size)[size // 2 :].tolist()
    assert abs(there["loss"] - math.log(recipe.model.vocab_size)) < 0.3
    assert there["certificate"] == json.loads((run / "hf" / "certificate.json").read_text(encoding="utf-8"))
    assert there["certificate"]["source"][0]["step"] == 6
    assert there["completion"].text and there["completion"].ended
    assert there["found"].sequences == 32
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == blocks()[-1].count("print(") + 1  # two completions
