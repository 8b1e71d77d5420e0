"""`rlg.apply`: guidance inside a diffusers pipeline."""
