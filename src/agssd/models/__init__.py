"""Encoders, heads and the cross-view fuser."""
