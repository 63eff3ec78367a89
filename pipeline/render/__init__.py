"""Pure pictures of plain rows: token HTML, heatmaps, curves and the report page. Needs no torch, no network."""
