"""The documents are true: their Python runs, their configs build, their commands exist."""

import re
import shlex

import mmdet.registry
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

from .common import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_runs_and_configs_build(path, tmp_path):
    namespace = {}  # the blocks of a document follow each other
    for number, block in enumerate(blocks(path, "python")):
        if "_base_ =" not in block:
            exec(compile(block, f"{path.name}, Python block {number + 1}", "exec"), namespace)
            continue
        config = tmp_path / f"config_{number}.py"
        config.write_text(block)
        cfg = Config.fromfile(config)
        init_default_scope("mmdet")
        mmdet.registry.MODELS.build(cfg.model)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_with_their_options(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    common = (ROOT / "mmsoftpool" / "engine.py").read_text()
    commands = [
        line for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines()
    ]
    commands += re.findall(r"`((?:python|make) [^`]+)`", path.read_text())
    for command in commands:
        words = shlex.split(command.replace("...", ""), comments=True)
        if "make" in words:
            assert words[words.index("make") + 1] in targets, command
        for word in words:
            if re.match(r"(tools|configs)/.*\w$", word):
                assert (ROOT / word).is_file(), command
        tools = [word for word in words if word.startswith("tools/")]
        if tools:
            source = (ROOT / tools[0]).read_text() + common
            if tools[0].endswith(".sh"):  # which hands its options on
                source += (ROOT / tools[0].replace("dist_", "").replace(".sh", ".py")).read_text()
            for option in (
                word for word in words[words.index(tools[0]) :] if word.startswith("--")
            ):
                # make_shapes.py makes its options in a loop over their names.
                assert f'"{option}"' in source or f'"{option[2:]}"' in source, command


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target
