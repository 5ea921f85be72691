"""The base model: its files, its architecture, and how it is built, quantized and saved."""
