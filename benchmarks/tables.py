"""From benchmarks/results.json to the tables of docs/benchmarks.md and the READMEs: `python benchmarks/tables.py`.

A page says where its table goes by a pair of comments, `<!-- benchmarks: begin -->` and `<!-- benchmarks: end -->`; what
stands between them is written anew, all else is left alone. A test compares pages and results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
DOCS = ROOT / "docs" / "benchmarks.md"
READMES = {
    "README.md": (
        "Beside other programs on the same machine, with the same model, data and precision; medians, all figures and "
        "how they were measured are in [docs/benchmarks.md](docs/benchmarks.md):",
        ("kitae against", "times as fast", "peak memory"),
    ),
    "README.ja.md": (
        "同じマシン、同じモデル、同じデータ、同じ精度で他のプログラムと比べた中央値です。全数値と測り方は "
        "[docs/benchmarks.md](docs/benchmarks.md) にあります。",
        ("kitae の比較相手", "速さ（倍）", "最大メモリ"),
    ),
    "README.zh.md": (
        "在同一台机器上、以相同的模型、数据和精度与其他程序对比的中位数；全部数字和测量方法见 "
        "[docs/benchmarks.md](docs/benchmarks.md)。",
        ("kitae 对比", "速度（倍）", "峰值内存"),
    ),
}
"""Pages with the short table: the sentence above it, and its headings."""
BLOCK = re.compile(r"(<!-- benchmarks: begin -->\n).*?(<!-- benchmarks: end -->)", re.DOTALL)
IN_README = {
    "sft": ["trl", "trl-packed-best", "transformers"],
    "sft-lora": ["trl", "trl-packed-best"],
    "sft-150k": ["trl", "trl-packed-best"],
    "sft-moe": ["trl", "trl-packed-best"],
    "dpo": ["trl", "trl-best"],
    "grpo": ["trl", "trl-best"],
    "rollout-bfloat16": ["generate", "continuous", "llama.cpp"],
    "rollout-float32": ["generate", "llama.cpp"],
    "stream-bfloat16": ["llama.cpp"],
    "startup": ["trl"],
    "serving-1": ["llama.cpp"],
    "serving-16": ["llama.cpp"],
    "serving-64": ["llama.cpp"],
}
"""Benchmark -> peers that the READMEs name."""


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def spread(value: dict[str, float], *, digits: int) -> str:
    """`median (low-high)`."""
    return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f}-{value['high']:,.{digits}f})"


def digits_for(value: float) -> int:
    """About three figures."""
    return 0 if value >= 100 else 2 if value >= 1 else 3


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its heading, and all columns but the first are numbers."""
    header, *body = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def of_benchmark(result: dict[str, Any]) -> str:
    """Heading, what was measured where, one line per contender, and the floor."""
    name, unit = result["ours"], result["unit"]
    rows = [["", unit, "peak RSS MiB", f"{name}'s speed", "target", f"{name}'s memory", "target"]]
    for number, (peer, c) in enumerate(result["against"].items()):
        digits = digits_for(c["ours"]["median"])
        if number == 0:
            memory = spread(c["our_memory_mib"], digits=0)
            rows.append([f"**{name}**", spread(c["ours"], digits=digits), memory, "", "", "", ""])
        rows.append(
            [
                peer,
                spread(c["theirs"], digits=digits),
                spread(c["their_memory_mib"], digits=0),
                spread(c["ratio"], digits=2),
                "" if c["target"] is None else f"≥ {c['target']:g}",
                spread(c["memory_ratio"], digits=2),
                "" if c["memory_target"] is None else f"≤ {c['memory_target']:g}",
            ]
        )
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in sorted(result["versions"].items()))
    about = f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores; {result['rounds']} rounds; {versions}."
    if result["disturbed"]:
        about += f" **Disturbed**: other programs kept up to {result['other_cores']:.2f} cores busy."
    text = f"### {result['title']}\n\n`{result['command']}`\n\n{about}\n\n{table(rows)}"
    if floor := result["floor"]:
        limit = f"{floor['limit']:,.{digits_for(floor['limit'])}f} {unit}"
        target = "" if floor["target"] is None else f"; the target is {floor['target']:.0%}"
        text += f"\nFloor: {floor['what']}, {limit}. {name} is at {floor['share']:.0%}{target}.\n"
    return text + "".join(f"\n{note}\n" for note in result.get("notes", []))


def for_docs(results: dict[str, Any]) -> str:
    return (
        "\n".join(of_benchmark(result) for result in results.values()) or "Nothing has been measured yet.\n"
    )


def for_readme(results: dict[str, Any], *, sentence: str, headings: tuple[str, str, str]) -> str:
    """Medians of the ratios only, peers that the README names; nothing where none was measured."""
    rows = [list(headings)]
    for name, peers in IN_README.items():
        for peer in peers:
            if c := results.get(name, {}).get("against", {}).get(peer):
                ratio, memory = c["ratio"]["median"], c["memory_ratio"]["median"]
                rows.append([f"{results[name]['title']} / {peer}", f"{ratio:.1f}×", f"{memory:.2f}×"])
    return f"{sentence}\n\n{table(rows)}" if len(rows) > 1 else ""


def written(page: Path, results: dict[str, Any]) -> str | None:
    """The page as it should be; None where it has no place for a table."""
    text = page.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        return None
    if page == DOCS:
        block = for_docs(results)
    else:
        sentence, headings = READMES[page.name]
        block = for_readme(results, sentence=sentence, headings=headings)
    return BLOCK.sub(lambda found: f"{found[1]}{block}{found[2]}", text)


def pages() -> list[Path]:
    return [DOCS, *(ROOT / name for name in READMES)]


def main() -> None:
    results = read_results()
    for page in pages():
        if (text := written(page, results)) is not None:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
