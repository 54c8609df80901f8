"""What a person or a program reads of a run.

    facts       seconds per stage, peak memory, versions
    progress    one bar with the time left on a terminal, plain lines elsewhere; always on stderr
    comparison  a model's perplexity beside its baseline's
    methods     the pruning methods, read from their classes
    artefact    the files of OUT/secateur/: recipe, records, report, promise
    jsonable    JSON that every parser reads
    tables      rich tables on stdout

Nothing here computes; it reads records and files.
"""
