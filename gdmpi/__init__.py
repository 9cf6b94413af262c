"""Federated fine-tuning of large language models as an MPI batch program."""

__version__ = "0.1.0"
