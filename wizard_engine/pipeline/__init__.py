"""A whole run from one file: what it holds, the graph of its stages, and the driver that runs them."""
