"""One run on the workers of a Ray cluster; the driver alone writes the run file (extra ``cluster``)."""
