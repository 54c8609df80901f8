"""English text that every CPython ships: the language reference behind ``help("if")`` (``pydoc_data.topics``).

What: 79 topics in Python 3.11; after the split 73,658 SmolLM2 tokens to calibrate on (35 windows of 2048) and 17,162
held out (8 windows). Why: a demo must run where neither a hub nor a file is reachable. It is technical prose of one
kind, so perplexities measured on it say how two models compare, not how good either is. The text changes with the
Python version; the sha256 in the provenance tells.

Split: every fifth topic is held out, the rest calibrates. Topics quote one another ("specialnames" holds
"attribute-access" word for word), so each paragraph is kept once only, the held-out topics choosing first: no
paragraph is on both sides.
"""

import re

from secateur.errors import DataError

HELD_OUT_EVERY = 5


def embedded_documents(split: str) -> list[str]:
    """The topics of one side, ``"calibration"`` or ``"evaluation"``, without any paragraph of the other side."""
    topics = _topics()
    held_out = topics[::HELD_OUT_EVERY]
    others = [topic for i, topic in enumerate(topics) if i % HELD_OUT_EVERY]
    seen: set[str] = set()
    sides = {"evaluation": _first_occurrences(held_out, seen), "calibration": _first_occurrences(others, seen)}
    return sides[split]


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "`embedded` text: this Python ships without pydoc_data; give a local .txt, .jsonl or .parquet file"
        ) from error
    return [topics[name] for name in sorted(topics)]


def _first_occurrences(documents: list[str], seen: set[str]) -> list[str]:
    """Drop paragraphs already in ``seen`` (compared with white space collapsed) and add the kept ones to it."""
    kept = []
    for document in documents:
        fresh = []
        for paragraph in re.split(r"\n\s*\n", document.strip()):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            kept.append("\n\n".join(fresh))
    return kept
