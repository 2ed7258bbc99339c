"""The page of `zoomr view --html`: one file with everything in it, which loads and sends nothing. `view.py` calls it.

What a model wrote stands in the page as JSON in a data block, with every `<`, `>` and `&` escaped, and reaches the
reader's eyes as text nodes only. The content security policy names the hashes of the page's one script and one style
sheet, so that nothing else runs even if that failed. The page itself is `view_page.html`, and what draws per-head caches in
its script `view_page_heads.js`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

MARK = "<!-- zoomr view -->"
"""Stands near the beginning of every page, so that only a page is ever replaced by another one."""

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def page(pictures: list[dict[str, Any]], first: int) -> str:
    """The page with the problems ``pictures`` (`trace_view.picture`), number ``first`` shown at the start. ASCII but for the template."""
    template, heads = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("view_page.html", "view_page_heads.js"))
    template = template.replace("__HEADS__", heads)
    data = json.dumps({"problems": pictures, "first": first}, separators=(",", ":")).translate(_ESCAPES)
    before, after = template.replace("__CSP__", _policy(template)).split("__DATA__")
    return before + data + after


def _policy(template: str) -> str:
    (style,) = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)};"
        " img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
