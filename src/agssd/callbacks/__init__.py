"""When and how much: schedules, monitors and pictures; they see modules only through the protocols of types.py."""
