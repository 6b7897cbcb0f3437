"""The tile table of experts: how many rows a tile has, and how many tiles rows of experts need."""

# Rows of a tile of the tile table; blocks of rows of the grouped products divide it.
TILE_ROWS = 128


def num_slots(rows: int, num_experts: int) -> int:
    """Tiles that R rows of E experts can need at most: ceil(R / 128) + E - 1."""
    return -(-rows // TILE_ROWS) + num_experts - 1
