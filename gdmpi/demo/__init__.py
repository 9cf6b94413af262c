"""The built-in demo: a small instruction data set and a tiny pretrained causal language model."""
