"""One file a route; each has `router(engine)`."""
