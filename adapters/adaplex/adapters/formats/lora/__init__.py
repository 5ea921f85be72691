"""LoRA as HF PEFT writes it, and its variants."""
