"""Speech recognition over a FastConformer: heads, their losses, greedy decoding."""
