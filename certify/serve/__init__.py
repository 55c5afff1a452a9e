"""A server that makes the classifier behind it robust (extra ``serve``)."""
