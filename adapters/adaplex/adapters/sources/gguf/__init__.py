"""GGUF files, and llama.cpp's LoRA adapters in them."""
