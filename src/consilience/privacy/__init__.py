"""Privacy of clients: what of their updates a run lets out. Central differential privacy, and secret sums."""
