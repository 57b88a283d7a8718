"""From a source file to a case: orientation, spacing, intensity, foreground, constants."""
