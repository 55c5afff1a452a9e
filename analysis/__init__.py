"""Reads run files, makes curves, tables and pictures of them, and attacks; certify alone decides certificates."""
