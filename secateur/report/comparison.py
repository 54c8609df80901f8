"""A model beside its baseline on one text."""

from dataclasses import asdict, dataclass
from typing import Any

from secateur.evaluation.perplexity import PerplexityResult, log_gap


@dataclass(frozen=True)
class Comparison:
    """One text: a model's perplexity, and the baseline's where one was given."""

    result: PerplexityResult
    baseline: PerplexityResult | None = None
    log_ppl_gap: float | None = None
    """ln ppl - ln ppl of the baseline: 0.1 is 10 % more perplexity. None where the two do not compare."""
    note: str = ""
    """Why they do not."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(result: PerplexityResult, baseline: PerplexityResult) -> Comparison:
    """Both results, and their gap where they measured the same thing."""
    try:
        return Comparison(result, baseline, log_gap(result, baseline))
    except ValueError as error:  # another tokenizer, say: both numbers are right, their difference means nothing
        return Comparison(result, baseline, note=str(error))
