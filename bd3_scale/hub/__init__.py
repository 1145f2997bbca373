"""Modelling code that is copied into exported Hugging Face directories. It imports torch and transformers, nothing of ours."""
