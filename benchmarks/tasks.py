"""Zero-shot accuracy of a dense model and what was made of it, on questions that lie under SECATEUR_DATA.

    python benchmarks/tasks.py MODEL [MODEL ...] [--limit N] [--tasks arc_easy ...]

Tasks, prompts and scores are lm-eval's own; only the place of the questions is another (tasks/ of the data, whose
README says what is complete and what a sample). Every model is compared with the first, question by question. One line
of JSON for each metric. Float32 forwards, one question at a time.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from secateur.evaluation.tasks import ScorePair, scores
from secateur.models.load import load

DATA = Path(os.environ.get("SECATEUR_DATA") or Path(__file__).parents[2] / "shared" / "data") / "tasks"
FILES = {
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.jsonl",
    "piqa": "piqa_valid.jsonl",
    "hellaswag": "hellaswag_val_sample2000.jsonl",
    "openbookqa": "openbookqa_test.jsonl",
    "winogrande": "winogrande_xl_valid.jsonl",
}


def task(name: str, manager: TaskManager) -> dict[str, Any]:
    """lm-eval's task with its questions from a file, whatever split they are of."""
    files = {"data_files": {"test": str(DATA / FILES[name])}}
    place = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    return load_yaml(str(manager.task_index[name].yaml_path)) | place | splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tasks", nargs="+", choices=list(FILES), default=list(FILES))
    args = parser.parse_args()
    manager, baseline = TaskManager(), None
    tasks = [task(name, manager) for name in args.tasks]
    for model in args.models:
        loaded = load(model, dtype="float32")
        found = scores(loaded.model, loaded.tokenizer, tasks, limit=args.limit)
        for score, other in zip(found, baseline or [None] * len(found), strict=True):
            told = ScorePair(score, other).to_dict()
            for one in filter(None, (told["score"], told["baseline"])):
                del one["answers"]
            print(json.dumps({"model": model, **told}), flush=True)
        baseline = baseline or found


if __name__ == "__main__":
    main()
