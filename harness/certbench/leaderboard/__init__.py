"""Boards derived from rows and from nothing else. Never imports torch."""
