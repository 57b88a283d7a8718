"""Where region maps come from: supervoxels, label maps, and SAM."""
