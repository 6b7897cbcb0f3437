"""Progress of reading and writing models."""

from wizard_engine.runtime.metrics import Progress

# Seconds before a bar appears: small models are done by then.
DELAY_SECONDS = 2.0


def byte_bar(description: str, total: int) -> Progress:
    """A bar of bytes, or lines where there is no terminal; a context manager, moved by `update(bytes)`."""
    return Progress(desc=description, total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=DELAY_SECONDS)
