"""The layers of docs/architecture.md, kept by reading every import of the project."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"types", "errors"},
    {"config", "settings", "plugins", "algos", "backends", "compiler", "health"},
    {"data", "rewards", "models", "parallel"},
    {"rollout", "train"},
    {"recipes", "evaluate", "export"},
    {"serve", "jobs"},
    {"cli", "console", "__main__", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FIRST_TOUR = [
    "recipes/grpo.py", "rewards/reasoning.py", "algos/advantages.py", "data/collate.py", "algos/averaging.py",
    "algos/losses.py", "models/seams.py", "models/heads.py", "train/learner.py", "rollout/base.py",
    "rollout/scheduler.py", "rollout/session.py", "rollout/generic.py", "recipes/_sampling.py", "recipes/_judging.py",
]  # fmt: skip


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "kitae")
    return relative.parts[0].removesuffix(".py")


def kitae_imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "kitae" and len(name.split(".")) > 1:
                yield node.lineno, name.split(".")[1]


def test_imports_point_down_the_layers():
    wrong = []
    for path in sorted((ROOT / "kitae").rglob("*.py")):
        own = room_of(path)
        assert own in LEVEL, f"{path} lies in no layer; add {own!r} to the architecture page and to this test"
        for line, other in kitae_imports(path):
            if other == own or other not in LEVEL:
                continue
            sibling_ok = LEVEL[own] in (1, 6)  # settings read config and plugins; commands share helpers
            if LEVEL[other] > LEVEL[own] or (LEVEL[other] == LEVEL[own] and not sibling_ok):
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({own}) imports {other}")
    assert not wrong, "\n".join(wrong)


def test_settings_and_recipe_settings_need_no_torch():
    code = (
        "import sys, kitae, kitae.types, kitae.config, kitae.settings, kitae.plugins, kitae.health\n"
        "recipes = kitae.plugins.names_in('kitae.recipes')\n"
        "assert {'sft', 'grpo'} <= set(recipes), recipes\n"
        "for name in recipes: kitae.settings.settings_class(name)\n"
        "bad = [m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules]\n"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def code_lines(path: Path) -> int:
    """Lines that are neither blank, comment, nor docstring."""
    tree = ast.parse(path.read_text())
    documented: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = path.read_text().splitlines()
    return sum(
        1
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.strip().startswith("#") and number not in documented
    )


def test_grpo_can_be_read_in_one_sitting():
    lines = {name: code_lines(ROOT / "kitae" / name) for name in FIRST_TOUR}
    assert sum(lines.values()) <= 1500, lines


def test_the_architecture_page_names_every_file_and_the_tour():
    page = (ROOT / "docs" / "architecture.md").read_text()
    layout = set(re.findall(r"\w+", page[page.index("## 3. Layout") : page.index("## 4.")]))
    told_by_folder = {"cli", "settings", "health"}
    files = [path.relative_to(ROOT / "kitae") for path in (ROOT / "kitae").rglob("*.py")]
    named = [f for f in files if f.parts[0] not in told_by_folder and not f.stem.startswith("__")]
    assert not [str(f) for f in named if f.stem not in layout]
    tour = page[page.index("*Understand GRPO*") :].split("\n", 1)[0]
    assert re.findall(r"`(.+?)`", tour) == FIRST_TOUR


BANNED_CALLS = {"eval", "exec", "torch.load", "os.system", "yaml.load"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle"}


def test_no_pickle_no_eval_and_no_shell_anywhere():
    found = []
    for path in sorted((ROOT / "kitae").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            what = ""
            if isinstance(node, ast.Call):
                has_shell = any(k.arg == "shell" and ast.unparse(k.value) == "True" for k in node.keywords)
                what = ast.unparse(node.func) if ast.unparse(node.func) in BANNED_CALLS or has_shell else ""
            elif isinstance(node, ast.Import):
                what = next((a.name for a in node.names if a.name.split(".")[0] in BANNED_MODULES), "")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
                what = node.module
            if what:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {what}")
    assert not found, "\n".join(found)
