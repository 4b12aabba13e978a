"""Measurements: imports hf_compact, never the other way round."""
