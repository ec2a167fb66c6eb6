"""Proof that a folder means the model that was trained.

`record` is what a certificate says, `verify` makes one; `tensors`, `settings` and `conversations`
compare what lies in the folder, `probe` and `consumers` what programs compute from it.
"""
