"""LightningDataModules, the cache they read and its writer."""
