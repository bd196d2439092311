"""The server process: memory, processors, threads, liveness."""
