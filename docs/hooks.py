"""Shows the docstrings' reStructuredText roles, as in :class:`Name`, as plain code."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Drop the role's name, and the module in front of a name that begins with ``~``."""
    html = re.sub(r":(?:func|class|meth|mod):(?=<code>)", "", html)
    return re.sub(r"(<code>)~[\w.]+\.(\w+</code>)", r"\1\2", html)
