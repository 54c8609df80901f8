"""One-shot pruning of a whole model: the pipeline, and how each method treats a block."""
