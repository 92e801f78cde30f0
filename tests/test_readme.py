"""The README keeps its word: its Python code runs, its commands exist, its configs parse."""

import re
from pathlib import Path

import pytest

from scoreinv.cli import COMMANDS
from scoreinv.cli.parse import parse
from scoreinv.cli.sample import SampleConfig
from scoreinv.cli.train import TrainConfig

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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_parse(path):
    """Every shipped config is complete and has no unknown key."""
    config = TrainConfig if path.stem.startswith("train") else SampleConfig
    extra = ["--output", "x"] if path.stem.startswith("train") else []
    assert parse(config, ["--config", str(path), *extra], "scoreinv")


def test_linked_files_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
