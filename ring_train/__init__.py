"""Pretrain, fine-tune and export the Ring / Ling 2.0 family of hybrid language models."""
