"""Command lines of the runtime, one file each; none loads torch, nor an engine before it has work for it."""
