"""Offline data preparation: documents to Megatron token shards.

Imports neither torch nor megatron nor ring_train.
"""
