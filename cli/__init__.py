"""The command line, imported as `loram_cli`: it turns options into flags, calls a stage, and prints."""
