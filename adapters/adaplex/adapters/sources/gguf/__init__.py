"""GGUF files, and the LoRA adapters of llama.cpp in them."""
