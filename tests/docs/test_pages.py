"""The pages say what is true: commands parse, Python runs, links lead somewhere, every named setting exists."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from kitae.cli import compare, evaluate, export, generate, reward, sample
from kitae.cli._stages import read_pipeline
from kitae.cli.chat import Settings as ChatSettings
from kitae.cli.main import commands
from kitae.cli.main import main as kitae_main
from kitae.cli.serve import Settings as ServeSettings
from kitae.plugins import names_in
from kitae.settings import read, resolve, settings_class
from kitae.settings.aliases import TABLE
from kitae.settings.fields import settings_of

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.ja.md", "README.zh.md"]
PAGES = sorted(
    [p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")] + [*READMES, "CONTRIBUTING.md"]
)
ABOUT_COMMANDS = [p for p in PAGES if p != "docs/benchmarks.md"]
"""Pages whose flags are kitae's; the benchmarks are scripts with flags of their own."""
LANGUAGES = ("bash", "toml", "python")
RECIPES = tuple(names_in("kitae.recipes"))
SETTINGS = {name for recipe in RECIPES for name in settings_of(settings_class(recipe))}
SECTIONS = {name.partition(".")[0] for name in SETTINGS if "." in name}
COLUMN = 33
"""Where the layout of the architecture page says what its files are."""
METRIC = r"(train|eval|rollout|perf|time)/\w+"
OTHER_FLAGS = {
    "--config",
    "--tensor-parallel-size",
    "--enable-expert-parallel",
    "--reasoning-parser",
    "--tp",
    "--ep",
    "--from",
    "--no_wait",
    "--dry_run",
    "--json",
    "--logdir",
    "--help",
    "--version",
    "--debug",
    "--row",
    "--recipe",
    "--nproc_per_node",
}


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
    if command == "pipeline":
        _, stages = read_pipeline(Path(rest[0]))
        assert rest[1:] in ([], ["--dry_run"], ["--from", stages[2].name])
        return None, stages[0]
    if command == "compare" and "--dataset_name" in rest:
        return read("evaluate", evaluate.Settings, [*rest[:1], *rest[2:]], positional=("model",))
    if command == "reward":
        assert rest[0] in reward.VERBS
        return read("reward", reward.Settings, reward.as_flags(rest[1:]))
    if command == "export":
        assert rest[0] in export.VERBS
        return export.parse(rest[0], rest[1:])
    if command == "endpoints":
        assert not rest or rest[0] in ("list", "info", "stop")
        return None, SimpleNamespace(warnings=[])
    root, positional = {
        "evaluate": (evaluate.Settings, ("model",)),
        "generate": (generate.Settings, ("model", "prompt")),
        "chat": (ChatSettings, ("model",)),
        "serve": (ServeSettings, ("model",)),
        "deploy": (ServeSettings, ("model",)),
        "compare": (compare.Settings, ("first", "second")),
        "sample": (sample.Settings, ("model", "dataset_name")),
    }[command]
    return read("serve" if command == "deploy" else command, root, rest, positional=positional)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_parses(page, workspace):
    run_toml = [block for block in blocks("README.md", "toml") if block.startswith("output_dir")]
    (workspace / "run.toml").write_text(run_toml[0], encoding="utf-8")
    for words in command_lines(page):
        if words[0] == "kitae" and words[1:2] != ["quickstart"]:
            _, notes = parse(words[1:])
            assert not notes.warnings, words


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.toml")))
def test_the_commands_at_the_head_of_an_example_parse(name, workspace):
    lines = [
        line[1:].strip() for line in read_page(f"examples/{name}").splitlines() if line.startswith("#   ")
    ]
    assert lines
    for line in lines:
        _, notes = parse(shlex.split(line)[1:])
        assert not notes.warnings, line


def test_the_parser_of_this_test_refuses_what_the_command_line_refuses(workspace):
    for words in (["train", "sft", "--learnin_rate", "1"], ["chat", "m", "--no_such", "1"]):
        assert kitae_main(words) == 2
        with pytest.raises(ValueError, match="unknown setting"):
            parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_toml_blocks_hold_settings_that_exist(page, tmp_path):
    for block in blocks(page, "toml"):
        if "[[stage]]" in block:
            (tmp_path / "pipeline.toml").write_text(block, encoding="utf-8")
            read_pipeline(tmp_path / "pipeline.toml")
            continue
        for section, values in tomllib.loads(block).items():
            names = [f"{section}.{name}" for name in values] if isinstance(values, dict) else [section]
            assert set(names) <= SETTINGS, names


def test_the_python_of_the_readme_runs(tiny, workspace, rows_file, capsys):
    [source] = blocks("README.md", "python")
    for name in ("train.jsonl", "test.jsonl"):
        rows_file(
            name,
            lambda i: {
                "problem": f"{i}+{i}?",
                "solution": f"It is \\boxed{{{2 * i}}}.",
                "answer": f"{2 * i}",
            },
        )
    assert "Qwen/Qwen2.5-0.5B" in source
    source = source.replace("Qwen/Qwen2.5-0.5B", str(tiny())).replace("256", "4")
    exec(compile(source, "README.md", "exec"), {})
    accuracy, completions = capsys.readouterr().out.splitlines()[-2:]
    assert float(accuracy) == 0.0
    assert completions.startswith("[")
    for run in ("sft", "grpo"):
        assert json.loads((workspace / "runs" / run / "status.json").read_text())["state"] == "finished"


def test_the_readmes_say_the_same_in_three_languages():
    first, *others = map(skeleton, READMES)
    for other in others:
        assert other == first


def skeleton(page):
    """What a translation keeps: code without its comments, headings, rows, items, and links but those among READMEs."""
    code = [re.sub(r"\s*#.*$", "", b, flags=re.MULTILINE) for name in LANGUAGES for b in blocks(page, name)]
    lines = prose(page).splitlines()
    kinds = [line.split()[0] for line in lines if line.startswith(("#", "| ", "- "))]
    return code, kinds, {link for link in links(page) if not link.startswith("README")}


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


def named_settings(page):
    """Every `section.name` of a page, whatever stands before or after it within the backticks."""
    words = [w for text in in_backticks(page) for w in re.findall(r"(?<![\w./$])\w+\.\w+(?![\w./(])", text)]
    suffixes = (".py", ".md", ".json", ".jsonl", ".log", ".toml")
    return {w for w in words if w.partition(".")[0] in SECTIONS and not w.endswith(suffixes)}


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_a_page_names_exists(page):
    assert named_settings(page) <= SETTINGS


@pytest.mark.parametrize("page", PAGES)
def test_every_metric_a_page_names_is_on_the_metrics_page(page):
    known = set(re.findall(r"^\| `(\w+/\w+)`", read_page("docs/metrics.md"), re.MULTILINE))
    assert {text for text in in_backticks(page) if re.fullmatch(METRIC, text)} <= known


@pytest.mark.parametrize("page", ABOUT_COMMANDS)
def test_every_flag_a_page_names_exists(page):
    flags = {flag for alias in TABLE for flag in alias.flags}
    ours = SETTINGS | {name.rpartition(".")[2] for name in SETTINGS}
    for root in (
        evaluate.Settings,
        generate.Settings,
        reward.Settings,
        sample.Settings,
        export.Settings,
        ChatSettings,
        ServeSettings,
    ):
        ours |= set(root.model_fields)
    for text in in_backticks(page):
        for flag in re.findall(r"(?<!\S)--[A-Za-z][\w.\-]*", text):
            assert flag in flags | OTHER_FLAGS or flag[2:].replace("-", "_") in ours, flag


def test_the_checks_of_names_look_at_something():
    assert named_settings("docs/troubleshooting.md") >= {
        "lora.rank",
        "save.keep",
        "reward.form",
        "data.weights",
    }
    assert "rollout/dead_groups" in in_backticks("docs/recipes/grpo.md")
    assert re.fullmatch(METRIC, "rollout/dead_groups") and not re.fullmatch(METRIC, "train/run.py")


def test_files_the_architecture_page_names_exist():
    page = read_page("docs/architecture.md")
    for name in re.findall(r"`(?:kitae/)?(\w+/[\w/]+\.py)`", page):
        assert (ROOT / "kitae" / name).is_file() or (ROOT / name).is_file(), name
    [layout] = re.findall(r"^```\nkitae/\n(.*?)^tests/", page, re.DOTALL | re.MULTILINE)
    folders = {f"{path.name}/" for path in (ROOT / "kitae").rglob("*") if path.is_dir()}
    files = {path.stem for path in (ROOT / "kitae").rglob("*.py")}
    for line in layout.splitlines():
        has_text = line[COLUMN - 2 : COLUMN] == "  "
        names = line[:COLUMN] if has_text else line
        for name in re.findall(r"\w+/?", names.replace(".py", "")):
            assert name in folders | files, line


def test_the_readme_and_the_help_know_the_same_commands():
    used = {words[1] for words in command_lines("README.md") if words[0] == "kitae"}
    assert used <= set(commands())
    assert set(commands()) - used == {"quickstart", "completion"}
