"""JSON that every parser reads: NaN and infinity, which JSON does not have, become null."""

import json
import math
from typing import Any


def dumps(data: Any, indent: int | None = 1) -> str:
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    match data:
        case dict():
            return {key: _finite(value) for key, value in data.items()}
        case list() | tuple():
            return [_finite(value) for value in data]
        case float() if not math.isfinite(data):
            return None
        case _:
            return data
