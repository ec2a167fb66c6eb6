"""What keeps a run going: signals, journal, bad steps, hangs, faults on purpose.

Empty on purpose: readers of journals need no torch.
"""
