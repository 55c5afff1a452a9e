"""Reads run files, makes curves, tables and pictures of them, and attacks; never samples noise for a certificate."""
