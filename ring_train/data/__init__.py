"""Token shards to micro batches: opening, blending by weight, windows, and the packed `Batch`.

What a sample holds is a function of (seed, weights, global sample index) alone; there is no state
to save, and the data-parallel size may change at any restart.
"""
