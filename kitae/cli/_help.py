"""Help pages and shell completion of settings classes, drawn by tyro from their types and docstrings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from kitae.config import Section


def is_asked(argv: Sequence[str]) -> bool:
    """Whether the words ask for help."""
    return any(word in ("-h", "--help") for word in argv)


def show(root: type[Section], *, prog: str, after: str = "") -> None:
    """Print every setting of a class, grouped by section, with type, default and docstring."""
    import tyro

    description = f"{(root.__doc__ or '').strip()} {after}".strip()
    with contextlib.suppress(SystemExit):
        tyro.cli(
            root,
            args=["--help"],
            prog=prog,
            description=description,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
