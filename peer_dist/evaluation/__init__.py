"""Held-out loss, expert usage and generated text."""
