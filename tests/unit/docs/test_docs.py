"""The documentation against the code: links, commands, snippets, metrics, dependencies."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer import TyperException

from surogate.cli.main import app
from surogate.config.check import check_files, part_of
from surogate.config.job import MODELS, resolve_job
from surogate.config.load import parse_yaml
from surogate.service import ServiceSettings

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "k8s/**/*.md")
    for path in ROOT.glob(pattern)
    if not {".venv", "build", "node_modules"} & set(path.relative_to(ROOT).parts)
)
SERVICES = ("trainer", "inference", "orchestrator", "reward")


@dataclass(frozen=True)
class Block:
    """A block of code in a page: fenced with a language, or indented without one."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced and the indented blocks of a page; indented lines of lists are no blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    index, before = 0, ""
    while index < len(lines):
        line, start = lines[index], index
        if fence := re.match(r"(\s*)```(\w*)", line):
            index = next(i for i in range(index + 1, len(lines)) if lines[i].strip() == "```")
            text = "\n".join(item.removeprefix(fence[1]) for item in lines[start + 1 : index])
            yield Block(page, start + 1, fence[2], text)
        elif line.startswith("    ") and not before:
            while index + 1 < len(lines) and (lines[index + 1].startswith("    ") or not lines[index + 1]):
                index += 1
            yield Block(page, start + 1, "", "\n".join(item[4:] for item in lines[start : index + 1]).rstrip())
        before = "" if index != start else lines[index].strip()
        index += 1


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands() -> list[tuple[str, list[str]]]:
    """Every `surogate …` command line of the pages, with where it stands."""
    found = []
    for block in BLOCKS:
        if block.language not in {"", "bash", "sh", "shell", "console"}:
            continue
        lines = [line.removeprefix("$ ") for line in block.text.replace("\\\n", " ").splitlines()]
        words = [shlex.split(line, comments=True) for line in lines if line.startswith("surogate ")]
        found += [(str(block), rest) for _, *rest in words]
    return found


def parsed(page: Path) -> str:
    """The page without its code blocks and inline code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"`[^`]*`", "", re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.M | re.S))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", parsed(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.relative_to(ROOT)} links to {target}"
        assert file.is_relative_to(ROOT)
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.relative_to(ROOT)} links to {target}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_reachable_from_the_index() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = re.findall(r"\]\(([^)\s#:]+\.md)[)#]", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / target).resolve() for target in targets]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in seen] == []


def test_the_pages_have_commands_to_check() -> None:
    assert len(commands()) > 20


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_parse(where: str, words: list[str]) -> None:
    try:
        parse(typer.main.get_command(app), "surogate", list(words))
    except TyperException as error:
        pytest.fail(f"{where}: surogate {shlex.join(words)}: {error.format_message()}")
    if words[0] == "serve" and len(words) > 1:
        check_service_flags(where, words[1], words[2:])


def parse(command: Any, name: str, arguments: list[str], parent: Any = None) -> None:
    """Parses a command line by a command and those below it, without running any."""
    with command.make_context(name, arguments, parent=parent) as context:
        if hasattr(command, "resolve_command"):
            below, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            parse(found, below, rest, context)


def check_service_flags(where: str, service: str, arguments: list[str]) -> None:
    """Whether a service has the flags that a page gives it."""
    assert service in SERVICES, where
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")} - {"--help"}
    known = {f"--{name.replace('_', '-')}" for name in settings_of(service).model_fields}
    assert flags <= known, f"{where}: {service} has no {', '.join(sorted(flags - known))}"


def settings_of(service: str) -> type[ServiceSettings]:
    from inference_svc.settings import InferenceSettings
    from orchestrator_svc.settings import OrchestratorSettings
    from reward_svc.settings import BuiltInSettings
    from trainer_svc.settings import TrainerSettings

    return {
        "trainer": TrainerSettings,
        "inference": InferenceSettings,
        "orchestrator": OrchestratorSettings,
        "reward": BuiltInSettings,
    }[service]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_snippets_load(block: Block, tmp_path: Path) -> None:
    document = parse_yaml(block.text, str(block))
    if document.data.get("kind") == "TrainingJob":
        resolve_job(document.data["spec"])
        return
    if "datasets" in document.data and "model" in document.data:
        (tmp_path / "train.yaml").write_text(block.text)
        assert check_files([tmp_path / "train.yaml"]).errors == []
        return
    part = part_of(document)
    model = MODELS[part]
    # What a snippet leaves out is said elsewhere; what it says must be right.
    elsewhere = {"rollouts_per_example": 8} if part == "orch" else {}
    try:
        model.model_validate({**elsewhere, **document.data}, context={"warnings": []})
    except ValueError as error:
        wrong = [item for item in error.errors() if item["type"] != "missing"]  # type: ignore[attr-defined]
        assert not wrong, f"{block}: {wrong}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_snippets_compile(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_is_documented(service: str) -> None:
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("operations.md", "security.md"))
    rows = re.findall(r"^\| (`.+?`) \|", text, re.M)
    documented = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)} | {"settings"}
    assert set(settings_of(service).model_fields) - documented == set()


def test_every_metric_is_documented() -> None:
    from surogate.telemetry import metrics

    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([a-z][a-z0-9_]*(?:/[a-z0-9_]+)*)`", page))
    assert {name for name in metrics.VOCABULARY if name not in documented} == set()
    assert {name for name in prometheus_names() if name not in documented} == set()
    masks = {name for name in metric_literals() if name.startswith("masked/")}
    missing = {name for name in metric_literals() - masks if name not in documented}
    assert missing == set(), "metrics in the code that docs/metrics.md does not name"
    assert {mask for mask in masks if mask.removeprefix("masked/") not in documented} <= {"masked/fraction"}


def sources() -> Iterator[ast.Module]:
    for package in ("surogate", *(f"{service}_svc" for service in SERVICES)):
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                yield ast.parse(path.read_text(encoding="utf-8"))


def metric_literals() -> set[str]:
    """Strings of the code that look like a step metric with a group: `reward/mean`."""
    groups = "reward|ratio|masked|completion|groups|policy|time|push|tokens|eval|canary|packing|memory|update"
    found = set()
    for tree in sources():
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(rf"(?:{groups})/[a-z][a-z_0-9]+", text):
                found.add(text)
    return found


def prometheus_names() -> set[str]:
    """Names of the counters, gauges and histograms that the code makes, as Prometheus shows them."""
    found = set()
    for tree in sources():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            name = node.args[0]
            if node.func.id in {"Counter", "Gauge", "Histogram"} and isinstance(name, ast.Constant):
                found.add(f"{name.value}_total" if node.func.id == "Counter" else str(name.value))
    return found


def test_dependencies_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.M)
    extras = project["project"]["optional-dependencies"]
    wanted = {
        "The package itself": project["project"]["dependencies"],
        "`dev`": extras["dev"],
        "`trainer`": extras["trainer"],
        "`gpu` and `cpu`": [*extras["gpu"], *extras["cpu"]],
        "`bench`": extras["bench"],
        "The build": project["build-system"]["requires"],
    }
    others = set(extras) - {"dev", "trainer", "gpu", "cpu", "bench"}
    wanted |= {f"`{extra}`": extras[extra] for extra in others}
    for title, requirements in wanted.items():
        section = next((text for text in sections if text.startswith(title)), "")
        rows = re.findall(r"^\| (`.+?) \| .+ \|$", section, re.M)
        listed = {name.lower() for row in rows for name in re.findall(r"`([^`]+)`", row)}
        names = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}
        assert listed == names, f"docs/dependencies.md, {title}"


def test_settings_of_pre_commit_are_yaml_with_local_hooks() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
