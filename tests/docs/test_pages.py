"""The pages say what is true: commands parse, Python runs, links lead somewhere, every named setting exists."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from kitae.cli import compare, evaluate, generate
from kitae.cli.chat import Settings as ChatSettings
from kitae.cli.main import commands
from kitae.cli.main import main as kitae_main
from kitae.config import SamplingSettings
from kitae.settings import read, resolve, settings_class
from kitae.settings.aliases import TABLE
from kitae.settings.fields import settings_of

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.ja.md", "README.zh.md"]
PAGES = sorted([p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")] + [*READMES, "CONTRIBUTING.md"])
RECIPES = ("sft", "grpo")
SETTINGS = {name for recipe in RECIPES for name in settings_of(settings_class(recipe))}
SECTIONS = {name.partition(".")[0] for name in SETTINGS if "." in name}
METRIC_GROUPS = ("train", "eval", "rollout", "perf", "time")


def read_page(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read_page(page), flags=re.DOTALL | re.MULTILINE)


def command_lines(page):
    """The commands of a page's bash blocks as words, with continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def prose(page):
    return re.sub(r"^```.*?^```", "", read_page(page), flags=re.DOTALL | re.MULTILINE)


def in_backticks(page):
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def parse(words):
    """What the command line would do with `words` before it loads anything."""
    command, rest = words[0], words[1:]
    if command == "launch":
        assert rest[0] == "--nproc_per_node" and rest[1].isdigit()
        return parse(rest[2:])
    if command == "train":
        return resolve(rest[0], rest[1:])
    if command == "trace":
        assert rest[1:] == ["--row", "0"]
        return resolve("grpo", rest[:1])
    if command == "compare" and "--dataset_name" in rest:
        return read("evaluate", evaluate.Settings, [*rest[:1], *rest[2:]], positional=("model",))
    root, positional = {
        "evaluate": (evaluate.Settings, ("model",)),
        "generate": (generate.Settings, ("model", "prompt")),
        "chat": (ChatSettings, ("model",)),
        "compare": (compare.Settings, ("first", "second")),
    }[command]
    return read(command, root, rest, positional=positional)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_parses(page, workspace):
    run_toml = [block for block in blocks("README.md", "toml") if block.startswith("output_dir")]
    (workspace / "run.toml").write_text(run_toml[0], encoding="utf-8")
    for words in command_lines(page):
        if words[0] == "kitae" and words[1:2] != ["quickstart"]:
            _, notes = parse(words[1:])
            assert not notes.warnings, words


def test_the_parser_of_this_test_refuses_what_the_command_line_refuses(workspace):
    for words in (["train", "sft", "--learnin_rate", "1"], ["chat", "m", "--no_such", "1"]):
        assert kitae_main(words) == 2
        with pytest.raises(ValueError, match="unknown setting"):
            parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_toml_blocks_hold_settings_that_exist(page):
    for block in blocks(page, "toml"):
        for section, values in tomllib.loads(block).items():
            names = [f"{section}.{name}" for name in values] if isinstance(values, dict) else [section]
            assert set(names) <= SETTINGS, names


@pytest.mark.parametrize("page", READMES)
def test_the_python_of_a_readme_runs(page, tiny, workspace, rows_file, capsys):
    [source] = blocks(page, "python")
    for name in ("train.jsonl", "test.jsonl"):
        rows_file(name, lambda i: {"problem": f"{i}+{i}?", "solution": f"It is \\boxed{{{2 * i}}}.", "answer": f"{2 * i}"})
    assert "Qwen/Qwen2.5-0.5B" in source
    source = source.replace("Qwen/Qwen2.5-0.5B", str(tiny())).replace("256", "4")
    exec(compile(source, page, "exec"), {})
    accuracy, completions = capsys.readouterr().out.splitlines()[-2:]
    assert float(accuracy) == 0.0
    assert completions.startswith("[")
    for run in ("sft", "grpo"):
        assert json.loads((workspace / "runs" / run / "status.json").read_text())["state"] == "finished"


def test_the_readmes_say_the_same_in_three_languages():
    first, *others = READMES
    for other in others:
        for language in ("bash", "toml", "python"):
            assert [strip_comments(b) for b in blocks(other, language)] == [strip_comments(b) for b in blocks(first, language)]
        assert re.findall(r"^#+ ", prose(other), re.MULTILINE) == re.findall(r"^#+ ", prose(first), re.MULTILINE)
        assert prose(other).count("\n| ") == prose(first).count("\n| ")
        assert prose(other).count("\n- ") == prose(first).count("\n- ")
        assert "<!-- quickstart" not in prose(first) or prose(other).count("<!--") == prose(first).count("<!--")
        own_links = {link for link in links(other) if not link.startswith("README")}
        assert own_links == {link for link in links(first) if not link.startswith("README")}


def strip_comments(block):
    """Comments are translated; what they stand beside is not."""
    return re.sub(r"\s*#.*$", "", block, flags=re.MULTILINE)


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_a_page_names_exists(page):
    for text in in_backticks(page):
        for section, name in re.findall(r"(?<![\w./$])(\w+)\.(\w+)\b(?![./(])", text):
            if section in SECTIONS and f"{section}.{name}" not in SETTINGS:
                is_file = (ROOT / "kitae" / text).exists() or name in ("py", "md", "json", "jsonl", "log", "jinja")
                assert is_file or f"{section}.{name}" in SECTIONS | nested_sections(), f"{section}.{name}"


def nested_sections():
    return {name.rpartition(".")[0] for name in SETTINGS}


@pytest.mark.parametrize("page", PAGES)
def test_every_metric_a_page_names_is_on_the_metrics_page(page):
    known = set(re.findall(r"^\| `(\w+/\w+)`", read_page("docs/metrics.md"), re.MULTILINE))
    for text in in_backticks(page):
        group, slash, name = text.partition("/")
        if slash and group in METRIC_GROUPS and re.fullmatch(r"\w+", name):
            assert text in known, text


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_a_page_names_exists(page):
    flags = {flag for alias in TABLE for flag in alias.flags}
    ours = SETTINGS | {name.rpartition(".")[2] for name in SETTINGS}
    for root in (evaluate.Settings, generate.Settings, ChatSettings, SamplingSettings):
        ours |= set(root.model_fields)
    of_programs = {"--help", "--version", "--debug", "--row", "--recipe", "--json", "--nproc_per_node", "--logdir"}
    quickstart = {"--sft_steps", "--grpo_rounds", "--held_out"}
    for text in in_backticks(page):
        for flag in re.findall(r"(?<!\S)--[A-Za-z][\w.\-]*", text):
            name = flag[2:].replace("-", "_")
            assert flag in flags | of_programs | quickstart or name in ours, flag


def test_files_the_architecture_page_names_exist():
    page = read_page("docs/architecture.md")
    for name in re.findall(r"`(?:kitae/)?(\w+/[\w/]+\.py)`", page):
        assert (ROOT / "kitae" / name).is_file() or (ROOT / name).is_file(), name
    [layout] = re.findall(r"^```\n(kitae/\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    package = layout.partition("tests/")[0]
    folder = None
    for line in package.splitlines()[1:]:
        names = re.split(r"\s{2,}", line.strip())
        if line.startswith("  ") and re.match(r"  \w+/", line):
            folder = names.pop(0).rstrip("/")
            assert (ROOT / "kitae" / folder).is_dir(), folder
        if not names or (len(names) == 1 and line.startswith(" " * 30)):
            continue
        for name in names[0].split():
            if name.startswith("families/"):
                for family in name[name.index("{") + 1 : -1].split(","):
                    assert (ROOT / "kitae" / folder / "families" / f"{family}.py").is_file(), family
            elif re.fullmatch(r"[a-z_0-9]+(\.py)?", name) and line[2:14].strip() in (f"{folder}/", ""):
                where = ROOT / "kitae" if name.endswith(".py") else ROOT / "kitae" / (folder or "")
                assert (where / f"{name.removesuffix('.py')}.py").is_file(), (folder, name)


def test_the_readme_and_the_help_know_the_same_commands():
    used = {words[1] for words in command_lines("README.md") if words[0] == "kitae"}
    assert used <= set(commands())
    assert set(commands()) - used == {"quickstart", "completion"}
