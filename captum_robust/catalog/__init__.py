"""What the command knows by name: methods, attacks, and how a run describes itself."""
