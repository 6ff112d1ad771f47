"""The Hub: what loram fetches from it and pushes to it."""
