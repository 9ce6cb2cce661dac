"""Write docs/recipes/README.md anew: python tests/methods/make_page.py."""

from __future__ import annotations

import sys

from methods import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    sys.exit(0)
