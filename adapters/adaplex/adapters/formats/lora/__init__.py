"""LoRA and its variants, as HF PEFT writes them."""
