"""Nouns of the toolkit, rounding, plug-ins and messages. Standard library only."""
