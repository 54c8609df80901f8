"""What the reports of prune and quantize have in common: source, recipe, text, errors and warnings."""

from collections.abc import Sequence
from typing import Any

from secateur.config import PruneConfig
from secateur.core.plan import Plan
from secateur.data.sources import Texts
from secateur.models.load import Loaded
from secateur.pruning.oneshot import BlockRecord
from secateur.pruning.records import short_of_tokens
from secateur.quantize_config import QuantizeConfig
from secateur.report.facts import versions


def run_report(
    loaded: Loaded, config: PruneConfig | QuantizeConfig, plan: Plan, texts: Texts, records: Sequence[BlockRecord]
) -> dict[str, Any]:
    """Ready for JSON; whoever ran adds what was made, and what it took."""
    linears = [linear for record in records for linear in record.linears]
    errors = [record.output_error for record in records if record.output_error is not None]
    return {
        "model": {"source": loaded.source, "class": type(loaded.model).__name__, "fingerprint": loaded.fingerprint},
        "recipe": config.to_dict(),
        "linears": len(linears),
        "weights": plan.size,
        "output_error": {"mean": sum(errors) / len(errors), "last": errors[-1]} if errors else None,
        "data": {
            **texts.provenance,
            "name": texts.name,
            "needed": config.needs_text,
            "samples": config.samples,
            "seq_len": config.seq_len,
        },
        "seed": config.seed,
        "dropped_rows": sum(record.dropped_rows for record in records),
        "warnings": [*short_of_tokens(linears), *(f"{one.name}: {one.note}" for one in linears if one.note)],
        "versions": versions(),
    }
