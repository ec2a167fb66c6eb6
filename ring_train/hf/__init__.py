"""Hugging Face folders: read into the trainer's tensors, written from them, run by transformers.

`config` and `table` say how the two sides correspond, `reader` and `writer` move tensors, `weights`
fills a model, `continuation` generates text; `modeling/` holds the files that travel in an export.
"""
