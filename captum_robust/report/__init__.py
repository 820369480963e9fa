"""What a run says: tables, plots, pictures and the page, read from its rows."""
