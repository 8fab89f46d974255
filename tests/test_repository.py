"""What the hosting site reads: workflows, hooks, the citation."""

import re

import yaml

from .common import ROOT


def test_pre_commit_has_the_versions_of_make_lint():
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {repo["repo"].rsplit("/", 1)[1]: repo["rev"].lstrip("v") for repo in hooks}
    assert revisions["ruff-pre-commit"] == pins["ruff"]
    assert revisions["mirrors-clang-format"] == pins["clang-format"]
    assert revisions["check-jsonschema"] == pins["check-jsonschema"]


def test_the_scheduled_versions_are_sessions_of_nox():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    sessions = yaml.safe_load(text)["jobs"]["versions"]["strategy"]["matrix"]["session"]
    assert sessions and set(sessions) <= set(
        re.findall(r'^    "([\w.-]+)": \(', (ROOT / "noxfile.py").read_text(), re.M)
    )
