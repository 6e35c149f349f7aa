"""The documentation: its code runs, its diffs show code that runs, its links and numbers hold."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Generator, Iterator
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from tests.optimizers import REFUSED, WRAPPABLE
from torch_booster import Diagnostics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
with_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist holds no records")
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
# In the form that does not parse as Python, so that no formatter takes it for a comparison.
SNIPPET = r"^( *)--8<--\n *(\S+)\n *--8<--\n"
OPTIONAL = ("accelerate", "datasets", "lightning", "peft", "tokenizers", "transformers", "trl")


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of one kind, snippets written out as the site does it."""

    def snippet(match: re.Match[str]) -> str:
        return textwrap.indent((ROOT / match[2]).read_text(), match[1])

    text = re.sub(SNIPPET, snippet, page.read_text(), flags=re.MULTILINE)
    found = [match for match in FENCE.finditer(text) if match["kind"] == kind]
    return [textwrap.dedent(match["body"]) for match in found]


def pages_with(kind: str) -> list[str]:
    return [name for name, page in PAGES.items() if blocks(page, kind)]


def load(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------- code


@pytest.fixture
def _one_loop_at_a_time() -> Generator[None]:
    """Pages start engines that keep state in the process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():  # a page that failed on its way
        torch.distributed.destroy_process_group()
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# TRL passes a name on that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.usefixtures("_one_loop_at_a_time")
@pytest.mark.parametrize("name", pages_with("python"))
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after another, in a namespace and a folder of their own."""
    code = blocks(PAGES[name], "python")
    for library in OPTIONAL:
        if re.search(rf"^(from|import) {library}\b", "\n".join(code), re.MULTILINE):
            pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    namespace: dict[str, Any] = {"__name__": "docs"}
    for number, block in enumerate(code, start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("name", pages_with("diff"))
def test_diffs_show_code_that_runs(name: str) -> None:
    """What a diff leaves stands in the code of the page, line by line; the rest is no Booster."""
    running = blocks(PAGES[RUNS_ON.get(name, name)], "python")
    code = [line.strip() for block in running for line in block.splitlines()]
    code = [line for line in code if line]
    for diff in blocks(PAGES[name], "diff"):
        before, after = [], []
        for line in diff.splitlines():
            assert line[:2] in {"", "+", "-", "+ ", "- ", "  "}, line
            text = line[2:].strip()
            if text and line[0] != "-":
                after.append(text)
            if text and line[0] != "+":
                before.append(text)
        assert "ooster" not in "".join(before) or name in DIFFS_BETWEEN_BOOSTERS, before
        assert any(after == code[i : i + len(after)] for i in range(len(code))), after


DIFFS_BETWEEN_BOOSTERS = {"loops/ddp.md"}  # one of them turns an option on
RUNS_ON = {"index.md": "loops/plain.md"}  # whose loop is the same


@pytest.mark.parametrize("name", PAGES)
def test_blocks_say_what_they_are(name: str) -> None:
    """A fence without a language would escape the tests above."""
    fences = re.findall(r"^ *```(.*)$", PAGES[name].read_text(), re.MULTILINE)
    assert {kind.split()[0] for kind in fences[::2]} <= {"python", "diff", "text", "bash"}
    assert not any(fences[1::2])


# ------------------------------------------------------------------------------ links, files


def links(name: str) -> Iterator[str]:
    text = re.sub(FENCE, "", PAGES[name].read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            yield target


def anchors(page: Path) -> list[str]:
    """What a link to a heading of the page ends in."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in headings]


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_resolve(name: str) -> None:
    for target in links(name):
        path, _, anchor = target.partition("#")
        page = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert page.is_file(), target
        assert page.is_relative_to(DOCS), f"{target} is not part of the site"
        if anchor:
            assert anchor in anchors(page), target


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name: str) -> None:
    """Files of the repository are named as code, not linked."""
    paths = re.findall(r"`((?:benchmarks|docs|examples|tests|torch_booster)/[^`\s]*)`", text(name))
    for path in paths:
        package, _, module = path.partition("/")
        place = files(package) if package == "torch_booster" else ROOT / package
        if RESULTS.is_dir() or not path.startswith("benchmarks/results"):
            assert (Path(str(place)) / module).exists(), path


def text(name: str) -> str:
    return PAGES[name].read_text()


def test_every_page_is_in_the_navigation() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    nav = configuration[configuration.index("\nnav:") : configuration.index("\nvalidation:")]
    listed = re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)


def test_every_module_has_its_reference() -> None:
    package = ROOT / "torch_booster"
    modules = {
        str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for file in package.rglob("*.py")
        if file.name not in ("__init__.py", "optimizer.py")  # whose class the package exports
    }
    pages = [page.read_text() for page in (DOCS / "api").iterdir()]
    shown = re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE)
    assert modules <= {*shown}
    assert "torch_booster.BoosterOptimizer" in shown


def test_every_image_is_shown() -> None:
    shown = {Path(target).name for name in PAGES for target in links(name)}
    assert {image.name for image in (DOCS / "images").iterdir()} <= shown


# -------------------------------------------------------------------------- claims, numbers


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of a page's first table after a line, without its head."""
    return cells(text(name), heading)


def cells(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a line, without its head."""
    rows = re.findall(r"^\|.*\|$|^$", markdown.split(heading, 1)[1], re.MULTILINE)
    first = next(i for i, row in enumerate(rows) if row)
    body: list[list[str]] = []
    for row in rows[first + 2 :]:
        if not row:
            break
        body.append([cell.strip() for cell in row.strip("|").split(" | ")])
    return body


def test_the_method_quotes_the_source() -> None:
    source = files("torch_booster").joinpath("optimizer.py").read_text()
    rows = table("method.md", "## Where it is in the code")
    assert len(rows) >= 7
    places = [source.index(line.strip("`")) for _, line in rows]
    assert places == sorted(places)


def test_every_diagnostic_is_explained() -> None:
    rows = table("method.md", "## Diagnostics")
    assert tuple(row[0].strip("`") for row in rows) == Diagnostics._fields


def test_every_optimizer_of_torch_is_named() -> None:
    rows = table("loops/optimizers.md", "λ and α live")
    tested = ", ".join(names for names, verdict in rows if verdict.startswith("tested"))
    refused = [names for names, verdict in rows if verdict.startswith("refused")]
    assert sorted(tested.split(", ")) == sorted(WRAPPABLE)
    assert sorted(refused) == sorted(REFUSED)


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def published() -> tuple[Any, Any, Any]:
    """The benchmark's published tables, and its modules that read and draw them."""
    for library in ("peft", "seaborn", "tyro"):
        pytest.importorskip(library, reason=f"{library}, which the benchmark needs, is absent")
    from benchmarks.harmful_finetuning import figures, results, tables

    return results.load(), tables, figures


@with_results
def test_quoted_counts_of_the_trainers_own_tests_are_the_recorded_ones() -> None:
    recorded = record("trainer_tests")
    page = " ".join(text("loops/trainer.md").split())
    passed, boosted, calls = (
        recorded[key] for key in ("pass_as_they_are", "pass_with_booster", "train_calls")
    )
    assert f"Of {passed} tests that pass on a CPU without the hub, {boosted} pass" in page
    assert f"each of their {calls} calls" in page
    assert recorded["identical"] == calls
    others = [test["why"] for test in recorded["tests"].values() if "why" in test]
    assert len(others) == passed - boosted == 6
    assert sum(why.startswith("refused") for why in others) == 5


@with_results
def test_quoted_instability_is_the_recorded_one() -> None:
    records, _, figures = published()
    lora, full = (figures.demo_traces(records, trained) for trained in ("lora", "full"))
    recorded = lora[lora["seed"] == "seed 2"].set_index("step")
    names = ("alignment_loss", "harmful_loss", "harmful_loss_drop", "harmful_grad_norm")
    rows = table("choosing.md", "**Instability.**")
    assert [int(row[0]) for row in rows] == [850, 900, 950, 1000]
    for step, *cells in rows:
        for cell, key in zip(cells, (*names, "linearity"), strict=True):
            digits = len(cell.partition(".")[2])
            assert float(cell.replace("−", "-")) == round(recorded.loc[int(step), key], digits)

    quotients = [*lora[lora["seed"] != "seed 2"]["linearity"], *full["linearity"]]
    assert (round(min(quotients), 2), round(max(quotients), 2)) == (0.79, 1.03)
    assert "between 0.79 and 1.03" in text("choosing.md")


@with_results
def test_quoted_harmful_losses_are_the_recorded_ones() -> None:
    records, tables, _ = published()
    rows = table("choosing.md", "## The easy way out")
    runs = (("demo", "lora"), ("demo", "full"), ("stories260k", "lora"))
    for row, (name, trained) in zip(rows, runs, strict=True):
        found = tables.answers(records, name, trained, "first")
        for cell, method in zip(row[1:3], ("sft", "booster"), strict=True):
            losses = found.by_seed(method, found.values, "before_harmful_loss").values()
            assert cell == f"{sum(losses) / len(losses):.2f}"


FAULTS = [  # of the record, row by row
    ["error in place of an operator", "Ctrl-C after an operator"],
    ["out of memory in an allocation", "memory refused by the allocator"],
    ["NaN and infinite losses", "NaN and infinite gradients"],
    ["Ctrl-C at a bytecode"],
    ["real signal, SIGINT", "real signal, SIGTERM"],
    ["real signal, in the base's own step"],
    [
        "SIGKILL of a process that saves checkpoints, between two",
        "SIGKILL of a process that saves checkpoints, while one is written",
    ],
    ["operations in random sequences"],
    ["perturbations restored"],
    ["steps without growth"],
    ["runs broken off and resumed"],
    ["hostile input file"],
]


@with_results
def test_reliability_counts_are_the_recorded_ones() -> None:
    rows = table("reliability.md", "Counts on 2 CPU cores")
    counts = {count["fault"]: count for count in record("reliability")["counts"]}
    tried = [f"{sum(counts[fault]['tried'] for fault in faults):,}" for faults in FAULTS]
    assert [row[1] for row in rows] == tried
    assert counts.keys() == {fault for faults in FAULTS for fault in faults}
    assert not any(count["lost"] for count in counts.values())


@with_results
def test_the_compared_implementations_are_as_recorded() -> None:
    pytest.importorskip("rich", reason="the benchmarks extra is not installed")
    from benchmarks import comparison

    rows = record("comparison")["rows"]
    assert table("comparison.md", "asks for more:") == comparison.by_case(rows)
    settings = table("comparison.md", "## λ and α under one name")
    assert [[row[0], *row[2:]] for row in settings] == comparison.by_setting(rows)
    assert [row[1] for row in settings] == [*comparison.SETTINGS.values()]


README = (ROOT / "README.md").read_text()
BOTH = ("sft", "booster")
AFTER = "after_harmful_score"
MERGED = ("sft", None, "booster_merged")
SETTINGS: list[tuple[str, str, str, str, tuple[str | None, ...]]] = [
    # of the README's rows: experiment, what is trained, round, score, and the columns' methods
    ("recommended", "full", "", "usual", (*BOTH, "booster_recommended")),
    ("recommended", "full", "", AFTER, (*BOTH, "booster_recommended")),
    ("recommended", "lora", "shorter_step", "usual", MERGED),
    ("recommended", "lora", "shorter_one_adapter", "usual", MERGED),
    ("pretrained", "lora", "", AFTER, MERGED),
    ("pretrained", "lora", "one_adapter", AFTER, MERGED),
    ("pretrained", "lora", "bfloat16", AFTER, MERGED),
]


@with_results
def test_the_scores_in_the_readme_are_the_published_ones() -> None:
    records, tables, _ = published()
    rows = cells(README, "## What it does")
    for row, (name, trained, round_, score, methods) in zip(rows, SETTINGS, strict=True):
        found = tables.answers(records, name, trained, round_)
        for cell, method in zip(row[1:4], methods, strict=True):
            if method is None:
                assert cell == "–"
                continue
            scores = found.by_seed(method, [0.2], score).values()
            assert cell == f"{sum(scores) / len(scores):.1f}", (row[0], method)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        if RESULTS.is_dir() or not path.startswith("benchmarks/results"):
            assert (ROOT / path).is_file(), target
        if anchor:
            assert anchor in anchors(ROOT / path), target


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "docs/reliability.md"])
def test_the_named_commands_are_in_the_makefile(file: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"(?:`|^    )make ([a-z-]+)", (ROOT / file).read_text(), re.MULTILINE)
    assert commands
    assert set(commands) <= set(targets)


def sentences(markdown: str) -> Iterator[str]:
    """Those of the prose: code, tables and the targets of links are left out."""
    prose = re.sub(FENCE, "", markdown)
    prose = re.sub(r"^    .*$|^ *\|.*$|\]\([^)]*\)|`[^`]*`", "", prose, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?= *(?:[-*#!]|\d+\.) )", prose):
        yield from re.split(r"(?<=[.:?])\s", " ".join(paragraph.split()))


READ = [ROOT / "README.md", *PAGES.values(), *sorted(ROOT.glob("benchmarks/**/README.md"))]


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_has_more_than_three_numbers(page: Path) -> None:
    """A name with a digit in it (float32) is none, and 1,000 is one."""
    for sentence in sentences(page.read_text()):
        assert len(re.findall(r"(?<!\w)\d+(?:[.,]\d+)*", sentence)) <= 3, sentence


# ------------------------------------------------------------------------------------- site


def test_formulas_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    tree = ElementTree.fromstring(load("maths").mathml(r"w' = w_t - \alpha\,\tfrac{\nabla h}{2}"))
    assert tree.tag.endswith("math")
    assert "".join(tree.itertext()) == "w′=wt−α∇h2"
    assert not [element for element in tree.iter() if element.tag.endswith("msup")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(library, reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_builds_without_a_warning(site: Path) -> None:
    built = {str(page.relative_to(site).with_suffix(".md")) for page in site.rglob("*.html")}
    assert built == {*PAGES, "404.md"}
    assert not list(site.rglob("*.py*"))


def test_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text()
        assert not re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//", html
        )


def test_site_shows_formulas_diffs_and_doctests(site: Path) -> None:
    pages = {str(page.relative_to(site)): page.read_text() for page in site.rglob("*.html")}
    for name, html in pages.items():
        assert "arithmatex" not in html, name
        assert "--8&lt;--" not in html, name
        assert "&gt;&gt;&gt;" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL), name
    reference = pages["api/optimizer.html"]
    assert reference.count("<math ") == 1
    assert '<span class="gp">&gt;&gt;&gt; </span>' in reference
    for parameter in ("base_optimizer", "lam", "alpha", "replay_rng", "independent_ranks"):
        assert f"<code>{parameter}</code>" in reference
    assert "the quantity that is being regularised" in reference  # fields explained in comments
    plain = pages["loops/plain.html"]
    assert '<span class="gi">' in plain
    assert '<span class="gd">' in plain
