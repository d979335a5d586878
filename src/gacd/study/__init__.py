"""The paper's tables and figures as grids of cells: each a command, run once, resumed, recorded."""
