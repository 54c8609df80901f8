"""What a person or a program reads of a run: pages and files, what zeros are good for, and the progress bar.

Pages are rich tables on stdout; progress is always on stderr. The files are those of OUT/secateur/ (``artefact``):
recipe, records, report, promise.
"""
