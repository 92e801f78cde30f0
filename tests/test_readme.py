"""The README keeps its word: its Python code runs, its commands exist, its configs parse."""

import re
from pathlib import Path

from scoreinv.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "posterior.fits").exists()
    assert "draws" in capsys.readouterr().out


def test_commands_exist():
    used = set(re.findall(r"scoreinv (\w+) ", "\n".join(blocks("bash"))))
    assert used and used <= set(COMMANDS)


def test_linked_files_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
