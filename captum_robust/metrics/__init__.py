"""Localization metrics as torchmetrics classes."""
