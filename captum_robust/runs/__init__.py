"""The store of a run: its configuration and its rows."""
