"""Command lines of the runtime, one file each; none loads torch, and none loads an engine before it is asked to work."""
