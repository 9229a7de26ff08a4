"""Plain ASGI classes, one per file."""
