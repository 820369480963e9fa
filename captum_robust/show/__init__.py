"""One image or video: where the classifier looks, drawn."""
