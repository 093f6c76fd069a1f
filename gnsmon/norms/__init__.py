"""Squared norms of per-example gradients: forms, the rules that give them, and their oracles."""
