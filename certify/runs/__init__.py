"""Run files: writing, reading, resuming, recomputing, merging."""
