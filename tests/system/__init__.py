"""Drives real processes, as an operator and a client would."""
