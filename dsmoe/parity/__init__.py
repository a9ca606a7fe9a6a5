"""`dsmoe parity`: the same model on several layouts, compared."""
