"""An endpoint as text for a reader: what deploy and endpoints print."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitae.jobs.endpoints import Endpoint


SAID = "kitae: error: "
"""What the command line puts before an error, which says nothing in a quotation."""


def text_of(endpoint: Endpoint) -> str:
    """All a client needs, and what to do next."""
    info = endpoint.info()
    lines = [
        ("endpoint", endpoint.name),
        ("state", _state(info["state"], info.get("note"))),
        ("model", info["model"]),
    ]
    if info["url"] and info["state"] == "running":
        url = info["url"]
        lines += [
            ("models", ", ".join(info["models"])),
            ("base URL", f"{url}/v1"),
            ("token", endpoint.token),
            ("chat", f"kitae chat --endpoint {url} --token_file {endpoint.token_file}"),
            ("stop", f"kitae endpoints stop {endpoint.name}"),
        ]
    lines.append(("log", info["log"]))
    return "\n".join(f"{label:<9} {value}" for label, value in lines)


def table_of(endpoints: list[Endpoint]) -> str:
    """One line each: name, state, age, URL, model. Below, what is to be said of one."""
    if not endpoints:
        return "there is no endpoint; start one with kitae deploy MODEL"
    rows = [("NAME", "STATE", "AGE", "URL", "MODEL")]
    notes = []
    for endpoint in endpoints:
        info = endpoint.info()
        url = info["url"] if info["state"] == "running" else None
        rows.append((endpoint.name, info["state"], _age(info["created"]), url or "-", str(info["model"])))
        if note := info.get("note"):
            notes.append(f"{endpoint.name}: {note.removeprefix(SAID)}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    return "\n".join([*lines, *notes])


def _state(state: str, note: str | None) -> str:
    return f"{state} ({note.removeprefix(SAID)})" if note else state


def _age(created: float | None) -> str:
    if created is None:
        return "?"
    seconds = max(0, int(time.time() - created))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
