"""Every command that README, docs/ and the results show is one that `gacd` takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest

from gacd import cli

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "results/README.md", "benchmarks/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


def commands(text: str) -> Iterator[list[str]]:
    """The words after `gacd` of each command in a page's blocks, with shell variables filled in."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        variables = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(lines), re.MULTILINE))
        for line in lines:
            found = re.match(r"(?:(?:torchrun|srun) .*?)?\bgacd (.*)", line)
            if found and " | " not in line and "COMMAND" not in line:
                yield shlex.split(Template(found[1]).substitute(variables), comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        assert cli.main([*words, "--print_config"]) == 0, (words, capsys.readouterr().err)
    capsys.readouterr()


def test_the_commands_are_found() -> None:
    block = 'all="--seed 1"\ngacd train $all \\\n  --out a  # so\nsrun gacd seeds\n'
    text = f"```python\nx\n```\n\ngacd no\n\n```\n{block}```\n"
    assert list(commands(text)) == [["train", "--seed", "1", "--out", "a"], ["seeds"]]
    found = {page: len(list(commands((ROOT / page).read_text()))) for page in PAGES}
    assert sum(found.values()) > 40 and found["docs/guide.md"] == 6
