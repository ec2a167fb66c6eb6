"""Conversations: validated, rendered by the tokenizer's own template, encoded with a loss mask."""
