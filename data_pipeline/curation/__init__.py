"""Curation: documents pass a chain of declared steps; every one that does not is counted.

`nodes` is what a person may write, `rules` what it does to a document, `duplicates` the steps that
need to see the whole corpus, `passes` and `chain` the order of the work, `tally` the count that
must come out even, `output` the finished folder.
"""
