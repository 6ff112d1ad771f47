"""The Hub: what loram fetches from it (and, later, pushes to it)."""
