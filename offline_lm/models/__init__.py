"""Backbones, heads, and the critic that they make."""
