"""The same run on many devices: actors of a Ray application label, the driver alone writes (extra ``cluster``)."""
