"""Reads run files and makes curves, tables and pictures of them; never samples noise for a certificate."""
