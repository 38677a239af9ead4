"""Rules by which a source file is kept: those of DeepSeek-Coder (Guo et al. 2024, arXiv 2401.14196, section 2.1), which
are StarCoder's, reduced."""

from __future__ import annotations

import re

__all__ = ["keeps"]

_UNSEEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)


def keeps(suffix: str, text: str) -> bool:
    """Whether a file is kept for training.

    Args:
        suffix: of its name, lower case, with the dot.
        text: its content.
    """
    lines = text.splitlines()
    if not text.strip() or max(map(len, lines)) > 1000 or sum(map(len, lines)) > 100 * len(lines):
        return False
    if 4 * sum(map(str.isalpha, text)) < len(text):
        return False
    if suffix not in (".xsl", ".xslt") and "<?xml version=" in text[:100]:
        return False
    if suffix in (".html", ".htm"):
        seen = len(" ".join(_UNSEEN.sub(" ", text).split()))
        return seen >= 100 and 5 * seen >= len(text)
    return suffix not in (".json", ".yaml", ".yml") or 50 <= len(text) <= 5000
