"""Where volumes live: one module per kind of pool."""
