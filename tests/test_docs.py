"""The documents are true: their Python runs, their configs build, their commands parse, the files
and links they name exist."""

import argparse
import itertools
import json
import re
import shlex
from pathlib import Path

import mmdet.registry
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsoftpool import cli

from .common import ROOT, blocks, load_tool

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def inline_code(path):
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    )


def commands(path):
    """The shell commands of a page, each as a list of words."""
    lines = [
        line for block in blocks(path, "sh") for line in block.replace("\\\n", " ").split("\n")
    ]
    lines += [code for code in inline_code(path) if re.match("(python|make|tools/.*sh) ", code)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def parser_of(tool):
    if tool == "mmsoftpool":
        return strict(cli.make_command_parser())
    return strict(load_tool(ROOT / tool).make_parser())


def strict(parser):
    """The parser, with which an option must be written in full."""
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                strict(command)
    return parser


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# tests/test_own_data.py and test_inference.py run these two, which need data.
@pytest.mark.parametrize(
    "path",
    [page for page in PAGES if page.name not in ("own_data.md", "inference.md")],
    ids=lambda path: path.name,
)
def test_python_runs_and_configs_build(path, tmp_path):
    namespace = {}  # the blocks of a page follow each other
    for number, block in enumerate(blocks(path, "python")):
        if "_base_ =" not in block:
            exec(compile(block, f"{path.name}, Python block {number + 1}", "exec"), namespace)
            continue
        config = tmp_path / f"config_{number}.py"
        config.write_text(block)
        cfg = Config.fromfile(config)
        init_default_scope("mmdet")
        mmdet.registry.MODELS.build(cfg.model)


@every_page
def test_tools_take_the_commands(path):
    for words in commands(path):
        scripts = ("tools/", "benchmarks/", "paper/")
        tool = next(
            (n for n, w in enumerate(words) if w.startswith(scripts) or w == "mmsoftpool"), None
        )
        if tool is None or words[0] == "cd" or words[:2] == ["mim", "search"]:
            continue
        name, arguments = words[tool], words[tool + 1 :]
        assert name == "mmsoftpool" or (ROOT / name).is_file(), words
        if name.endswith(".sh"):  # tools/dist_X.sh CONFIG [CHECKPOINT] GPUS [options of X.py]
            gpus = 1 if name == "tools/dist_train.sh" else 2
            assert int(arguments.pop(gpus)) > 0, words
            given = [w.removeprefix("COMMAND=") for w in words[:tool] if w.startswith("COMMAND=")]
            default = "train" if name == "tools/dist_train.sh" else "test"
            name, arguments = "mmsoftpool", [*(given or [default]), *arguments]
        if name in ("tools/train.py", "tools/test.py"):
            name, arguments = "mmsoftpool", [Path(name).stem, *arguments]
        try:
            parser_of(name).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)} has wrong arguments; its usage is above")


@every_page
def test_make_has_the_targets(path):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(path):
        if "make" in words:
            assert words[words.index("make") + 1] in targets, words


@every_page
def test_named_files_exist(path):
    words = [word for words in commands(path) for word in words]
    for name in words + inline_code(path):
        if re.fullmatch(
            r"(configs|tools|scripts|csrc|mmsoftpool|benchmarks|paper|tests)/[\w{},*./]+", name
        ):
            pattern = re.sub(r"\{[^}]*\}", "*", name).rstrip("/")
            assert any(ROOT.glob(pattern)) or "yours" in name, name


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text()):
        if "://" in target:
            continue
        page = path.parent / target if target else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def test_the_tree_of_the_code_is_that_of_the_repository():
    (tree,) = blocks(ROOT / "docs" / "code.md", "text")
    folders, named = [], set()
    for line in tree.splitlines():
        indent, names = re.match(r"( *)((?:[\w./*]+ )*[\w./*]+)(?:  |$)", line).groups()
        folders = folders[: len(indent) // 2]
        for name in names.split():
            found = list(ROOT.glob("/".join([*folders, name]).rstrip("/")))
            assert found, line
            named.update(found)
        folders += [names.rstrip("/")]
    modules = {m for f in ("mmsoftpool", "benchmarks", "paper") for m in ROOT.glob(f"{f}/**/*.py")}
    modules |= set((ROOT / "csrc").rglob("*.*"))
    assert not {m for m in modules - named if m.name != "__init__.py"}


#: The names of the methods in the tables.
METHODS = {
    "`F.avg_pool2d`": "F.avg_pool2d",
    "`F.max_pool2d`": "F.max_pool2d",
    "exponential and two average pools": "exp and two avg pools",
    "`torch.compile` of the plain PyTorch form": "torch.compile(reference)",
}


class TestBenchmarks:
    """The ratios of the pages are those of the files in benchmarks/results/."""

    @staticmethod
    def measured(name: str) -> dict:
        rows = json.loads((RESULTS / f"cpu_epyc_2threads_{name}.json").read_text())
        return {(r["dtype"], r["layout"], r["pooling"][0], r["method"]): r for r in rows["rows"]}

    @staticmethod
    def table(page: str, heading: str) -> list[list[str]]:
        text = (ROOT / page).read_text()
        section = text[text.index(f"## {heading}\n") :].split("\n## ")[0]
        _, _, *rows = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)  # header, line, rows
        assert rows
        return [row.strip().split(" | ") for row in rows]

    def ratio(self, rows, layout, kernel, part, method, digits=0):
        def time(method):
            return rows["float32", layout.replace(" ", "_"), kernel, method][part]

        if method == "ms":
            return f"{1e3 * time('soft_pool2d'):.{digits}f}"
        return f"{time('soft_pool2d') / time(METHODS[method]):.2f}"

    @pytest.mark.parametrize(
        ("page", "heading"),
        [
            ("README.md", "What it costs"),
            ("docs/benchmarks.md", "The operator on the CPU"),
            ("docs/benchmarks.md", "Memory that the allocator keeps"),
            ("docs/benchmarks.md", "Other ways to compute it"),
        ],
    )
    def test_of_the_stem(self, page, heading):
        files = {"Memory": "kept_memory", "Other": "alternatives"}
        rows = self.measured(files.get(heading.split()[0], "avx512"))
        for name, *cells in self.table(page, heading):
            part, method = re.split(", | / ", name)
            part = "both" if part == "SoftPool" else part
            cases = itertools.product(("contiguous", "channels last"), (3, 2))
            assert cells == [self.ratio(rows, *case, part, method) for case in cases], name

    def test_of_large_windows(self):
        rows = self.measured("avx512")
        for name, *cells in self.table("docs/benchmarks.md", "Overlapping and global windows"):
            layout, part, method = re.split(": |, | / ", name)
            expected = [self.ratio(rows, layout, k, part, method, digits=1) for k in (5, 9, 13, 7)]
            assert cells == expected, name

    def test_of_the_instruction_sets(self):
        sets = [self.measured(name) for name in ("avx512", "avx2", "default")]
        for name, *cells in self.table("docs/benchmarks.md", "Instruction sets"):
            layout, part, method = re.split(": | / ", name)
            expected = [self.ratio(rows, layout, 3, part, method) for rows in sets]
            assert cells == expected, name

    def test_of_16_bit(self):
        rows = self.measured("16bit")
        for part, *cells in self.table("docs/benchmarks.md", "16 bit"):
            expected = [
                rows[dtype, layout, 3, "soft_pool2d"][part]
                / rows["float32", layout, 3, "soft_pool2d"][part]
                for layout in ("contiguous", "channels_last")
                for dtype in ("float16", "bfloat16")
            ]
            assert cells == [f"{ratio:.2f}" for ratio in expected], part

    def test_of_exported_files(self):
        rows = json.loads((RESULTS / "cpu_epyc_2threads_deploy.json").read_text())["rows"]
        for name, *cells in self.table("docs/benchmarks.md", "Exported files"):
            found = {
                (r["engine"], r["input"]): r
                for r in rows
                if r["case"].split()[0] == name.split()[0]
            }
            for i, engine in enumerate(("onnxruntime", "openvino")):
                fast, exact = found[engine, "fast"], found.get((engine, "exact"))
                ratio, ms = (float(x) for x in re.findall(r"[\d.]+", cells[2 * i]))
                assert ratio == pytest.approx(fast["ratio"], rel=0.05), name
                assert ms == pytest.approx(1e3 * fast["soft"], rel=0.06), name
                if exact:
                    assert float(cells[2 * i + 1]) == pytest.approx(exact["ratio"], rel=0.03), name

    def test_of_detectors(self):
        text = (ROOT / "docs" / "benchmarks.md").read_text()
        for name, stem in (("RetinaNet-R50", "retinanet"), ("YOLOX-s", "yolox")):
            file = RESULTS / f"cpu_epyc_2threads_{stem}.json"
            softpool, maxpool = json.loads(file.read_text())["rows"]
            assert f"{name} {softpool['train'] / maxpool['train']:.2f}" in text

    def test_in_the_sentences_of_the_readme(self):
        text = " ".join((ROOT / "README.md").read_text().split())
        rows = self.measured("kept_memory")
        kept = float(self.ratio(rows, "channels last", 3, "both", "`F.avg_pool2d`"))
        assert f"[{kept:.1f} times as long as average pooling]" in text
        file = RESULTS / "cpu_epyc_2threads_retinanet.json"
        softpool, maxpool = json.loads(file.read_text())["rows"]
        assert f"(ratio {softpool['train'] / maxpool['train']:.2f}, within the noise)" in text
