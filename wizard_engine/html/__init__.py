"""Self-contained pages, SVG charts and flow pictures."""
