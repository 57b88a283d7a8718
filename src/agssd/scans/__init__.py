"""Source scans: finding, reading, refusing and preparing them for the cache."""
