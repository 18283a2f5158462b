"""Near-duplicate documents: MinHash signatures, LSH candidates, exact verification, clusters.

Functions over arrays, without files: a stage of the pipeline decides where the parts of a corpus are kept. A
document is an int64 index into the whole corpus. See docs/corpus-dedup.md.
"""
