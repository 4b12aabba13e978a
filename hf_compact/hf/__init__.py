"""The surface towards Hugging Face: the quantizer plugin, the model card, files for others."""
