"""Localization metrics as pure functions on tensors."""
