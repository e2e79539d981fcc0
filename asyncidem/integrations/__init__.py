"""Integrations: each module needs its framework only, and none is imported by the package itself."""
