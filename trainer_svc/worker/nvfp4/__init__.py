"""Linear layers whose products are computed in NVFP4 (`recipe: nvfp4`)."""
