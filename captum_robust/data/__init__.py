"""Images with classes and boxes from what users have on disk."""
