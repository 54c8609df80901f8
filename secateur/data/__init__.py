"""Texts and tokens: where words come from and how they become windows of token ids.

    sources.py    read_texts: a name, a hub id or a file -> Texts (documents, joiner, provenance)
    embedded.py   English that ships with CPython, for machines with no network and no files
    tokens.py     tokenize, sample_windows (calibration), eval_windows (perplexity), check_seq_len

Import from the modules: ``sources`` needs no torch, so commands can check a name before anything heavy is loaded.
"""
