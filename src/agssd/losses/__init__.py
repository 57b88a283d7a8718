"""Losses as functions and small modules; nothing here knows a recipe."""
