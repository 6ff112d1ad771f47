"""What loram costs beside what it replaces, measured: `python -m benchmarks` (or `make bench`).

Contenders run as child processes in turns, one thread each, and medians are compared. The launcher never imports
torch: on Linux a child's peak memory starts at that of the process that forked it.
"""
